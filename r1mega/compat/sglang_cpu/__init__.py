"""SGLang's server on a machine without a GPU: what it is installed from, and what stands in for packages that it lacks.

``stand_ins`` is a folder for the server's PYTHONPATH, and for nobody else's: its ``sitecustomize`` runs in every process of the
server before SGLang does, and ``r1mega_bends`` is loaded by its registry of models (SGLANG_EXTERNAL_MODEL_PACKAGE). Each file says
in a table what it bends, the symptom, and when to remove it. Nothing of SGLang is changed on disk.

| bend | symptom without it | remove when |
|---|---|---|
| ``requirements.txt``, installed without dependencies | pip wants torch 2.11 and 5 GB of CUDA packages | sglang has an extra for the CPU on pip's index |
| :data:`ENVIRONMENT` SGLANG_USE_CPU_ENGINE | the server looks for a GPU and ends | ``--device cpu`` is enough |
| :data:`ENVIRONMENT` TORCHDYNAMO_DISABLE | the first request waits 75 s for a compiler | the compiled functions of a CPU are few |

Versions: sglang 0.5.16, and 0.5.23 by hand (``requirements.txt`` says how); torch 2.11 to 2.13.
"""

from __future__ import annotations

from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "r1mega_bends",
    "TORCHDYNAMO_DISABLE": "1",
}
"""Variables of a server's processes on a CPU, beside PYTHONPATH with :data:`STAND_INS` in front."""

ARGUMENTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
}
"""Server arguments on a CPU: the backends that need no compiled kernel; and it sleeps where it would spin, for others need the core."""
