"""How keys of a published ``config.json`` are read: each has a rule, and an error names it. No torch, no ModelConfig."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from r1mega.config.errors import UserError, either

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleave": (True, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Keys of which the model here has one value only; the first is the way out. A missing key means that value."""

IGNORED = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size "
    "exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id head_dim id2label is_decoder is_encoder_decoder label2id "
    "length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type "
    "pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef sep_token_id "
    "seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache".split()
)
"""Keys that change no logit and no name: of generation, of training elsewhere, of transformers' own bookkeeping."""


class KeyReader:
    """A config's values with their keys' rules."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config, self.where = config, where

    def refuse(self, key: str, rule: str, got: Any, way: str = "") -> None:
        """Raise UserError for ``key``."""
        way = way or "use a model that has it so, or correct config.json where it is wrong"
        got = str(got).lower() if isinstance(got, bool) else "null" if got is None else got
        raise UserError(f"{self.where}: {key}: {rule}; got {got}; {way}")

    def known(self, keys: frozenset[str] | set[str]) -> None:
        """Every key has a meaning here; null has none anywhere."""
        for key, value in self.config.items():
            if key not in keys and value is not None:
                self.refuse(key, "a key whose effect is known", value, "remove it from config.json if it changes no logit")

    def fixed(self) -> None:
        """Keys with one value."""
        for key, right in FIXED.items():
            if key in self.config and self.config[key] not in right:
                only = "null" if right[0] is None else either(right[:1])
                self.refuse(key, f"{only}, which is all that is computed here", self.config[key])

    def present(self, key: str) -> Any:
        """The value, null too, of a key that must be there."""
        if key not in self.config:
            raise UserError(f"{self.where}: {key}: every published config says it; got no such key; add it to config.json")
        return self.config[key]

    def all_there(self, keys: Iterable[str]) -> None:
        """Name every one of ``keys`` that is missing."""
        missing = [key for key in keys if key not in self.config]
        if missing:
            each = "each published config says it" if len(missing) == 1 else "each published config says them"
            raise UserError(f"{self.where}: {', '.join(missing)}: {each}; got no such key; add it to config.json")

    def optional(self, key: str, default: Any) -> Any:
        """The value, or ``default`` for null or no such key."""
        value = self.config.get(key)
        return default if value is None else value

    def whole(self, key: str) -> int:
        """A whole number that must be there."""
        value = self.present(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; without ``default`` it must be there."""
        value = self.present(key) if default is None else self.optional(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A truth value; without ``default`` it must be there."""
        value = self.present(key) if default is None else self.optional(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return value
