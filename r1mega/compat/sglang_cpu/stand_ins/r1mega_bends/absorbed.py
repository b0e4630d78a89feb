"""DeepSeek's attention on torch_native.

| bend | symptom without it | remove when |
|---|---|---|
| prefill takes the absorbed form too | the first prefill ends in a product of 192 by 576: the backend reads keys and values from the latent cache, as only that form has them | torch_native is among the backends that SGLang lists for DeepSeek |

Versions: sglang 0.5.16, 0.5.23.
"""

from sglang.srt.models.deepseek_common import attention_backend_handler
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

attention_backend_handler.AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
