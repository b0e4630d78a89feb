"""SGLang servers as the engine: started by us, or anybody's. The choice; ``engine`` has the work. Imports no torch."""
