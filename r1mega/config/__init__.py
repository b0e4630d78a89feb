"""What a run is: dataclasses with a doc string and a unit a field, rules, composition. Imports no torch."""
