"""The tokenizer: a byte-level BPE with DeepSeek-R1's conversation tokens, saved as a Hugging Face tokenizer folder.

Owns the special tokens, the chat template and how a prompt and a sample become token ids. A prompt is ``bos User question
Assistant <think>``; a response is ``reasoning</think><answer>ANSWER</answer>`` and the end-of-sequence token. Text in, ids out;
imports ``tokenizers`` only inside functions, torch and transformers never.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1mega.config.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT)
"""Tokens that decoding leaves out."""
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
"""Tokens of the response's format: one token each, kept in decoded text."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% set text = message['content'] %}"
    # Only the last turn shows its reasoning; of earlier ones the model sees the answer, as in R1's conversations.
    "{% if loop.last %}"
    "{% if '" + END_THINK + "' in text and not text.startswith('" + THINK + "') %}"
    "{% set text = '" + THINK + "' + text %}{% endif %}"
    "{% else %}{% set text = text.split('" + END_THINK + "')[-1] %}{% endif %}"
    "{{ '" + ASSISTANT + "' + text + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + THINK + "' }}{% endif %}"
)  # fmt: skip

# Words with their leading space, signs with theirs; a sign also takes the space before a digit, so that " + " between two numbers
# is one token. With single digits, a number is spelled the same way wherever it stands.
_SINGLE_DIGITS = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?!\S)|\s+"
_WHOLE_NUMBERS = r" ?\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A loaded tokenizer: text to ids and back; ``vocab_size`` (largest id + 1), ``bos_id``, ``eos_id``, ``pad_id``, ``hash``."""

    def __init__(self, backend: Any, path: str | Path):
        """``backend`` is a ``tokenizers.Tokenizer``. Raises UserError when a conversation token is missing."""
        self.backend, self.path = backend, Path(path)
        ids = {token: backend.token_to_id(token) for token in (*SPECIAL, *TAGS)}
        for token in (BOS, EOS, USER, ASSISTANT, THINK, END_THINK):
            if ids[token] is None:
                raise UserError(
                    f"{path}: a tokenizer has the token {token}; got none; use one that r1mega prepare made or DeepSeek-R1's"
                )
        self.bos_id: int = ids[BOS]
        self.eos_id: int = ids[EOS]
        self.pad_id: int = ids[EOS] if ids[PAD] is None else ids[PAD]
        # The largest id, not the number of entries: a foreign tokenizer may leave ids out, and an embedding needs a row for each.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.hash: str = tokenizer_hash(path)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is added, but special tokens written out in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of ``text`` in which special tokens that are written out are text like any other."""
        special = sorted((token.content for token in self.backend.get_added_tokens_decoder().values()), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            for part in (piece[:1], piece[1:]) if place % 2 else (piece,):
                ids += self.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, encoded by several threads (``RAYON_NUM_THREADS``), in order."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; special tokens are left out, the format's tags stay."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of one token. Raises UserError when the tokenizer lacks it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path}: the tokenizer has the token {token}; got none; use a tokenizer made by r1mega prepare")
        return found


def train_tokenizer(texts: Iterable[str], path: str | Path, *, vocab_size: int, split_digits: bool = True) -> Tokenizer:
    """Train a byte-level BPE on ``texts`` and save it to the folder ``path`` (tokenizer.json, tokenizer_config.json).

    vocab_size: entries at most, special tokens included (little text gives fewer). The conversation tokens have the ids 0 to 8. The
    folder loads with an unpatched ``AutoTokenizer``. Deterministic. Raises UserError when the bytes and special tokens do not fit.
    """
    from tokenizers import Regex, decoders, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = len(alphabet) + len(SPECIAL) + len(TAGS)
    if vocab_size < fixed:
        raise UserError(
            f"tokenizer.vocab_size: bytes and special tokens are {fixed} entries; got {vocab_size}; use at least {fixed}"
        )
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SINGLE_DIGITS if split_digits else _WHOLE_NUMBERS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *TAGS], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    backend.train_from_iterator(texts, trainer)
    saved = json.loads(backend.to_str())
    for token in saved["added_tokens"]:
        token["special"] = (
            token["content"] in SPECIAL
        )  # the trainer marks all as special, which would drop the tags from decoded text
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", saved)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": [USER, ASSISTANT],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return load_tokenizer(folder)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer folder (or an exported model's). Raises UserError when it holds no tokenizer or a damaged one."""
    from tokenizers import Tokenizer as Backend

    file = _tokenizer_file(path)
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises a bare Exception for every damage
        raise UserError(f"{file}: a tokenizer.json of the tokenizers library; got {error}; copy or train it again") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, path)


def tokenizer_hash(path: str | Path) -> str:
    """sha256 (hex) of a tokenizer folder's tokenizer.json: equal ids for equal text. Raises UserError when there is none."""
    return hashlib.sha256(_tokenizer_file(path).read_bytes()).hexdigest()


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy a tokenizer folder's own files (not a model beside them) into ``target``."""
    target_folder = Path(target)
    target_folder.mkdir(parents=True, exist_ok=True)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    _tokenizer_file(source)
    for name in names:
        if (Path(source) / name).is_file():
            (target_folder / name).write_bytes((Path(source) / name).read_bytes())


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of ``bos User question Assistant <think>``: the chat template's, with its generation prompt, for one user turn."""
    return tokenizer.encode(f"{BOS}{USER}{question}{ASSISTANT}{THINK}")


def encode_sample(tokenizer: Tokenizer, question: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of prompt, response and end of sequence, with the mask of what is to be learnt.

    response: ``reasoning</think><answer>ANSWER</answer>``. Returns (ids [L], mask [L]): 0 on the prompt, 1 on the response and the
    end of sequence.
    """
    prompt = encode_prompt(tokenizer, question)
    learnt = [*tokenizer.encode(response), tokenizer.eos_id]
    return [*prompt, *learnt], [0] * len(prompt) + [1] * len(learnt)


def encode_observation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what a policy reads between two of its turns: ``User text Assistant``; special tokens written out in it are text."""
    return [tokenizer.token_id(USER), *tokenizer.encode_plain(text), tokenizer.token_id(ASSISTANT)]


def encode_turns(tokenizer: Tokenizer, question: str, turns: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of a conversation with a tool, with the mask of what is to be learnt, as RL puts it together.

    turns: what the model writes and what it reads, in turn; an odd number. Returns (ids [L], mask [L]): 1 on what the model writes
    and on the end of sequence after each of its turns.
    """
    ids, mask = encode_sample(tokenizer, question, turns[0])
    for seen, said in zip(turns[1::2], turns[2::2], strict=True):
        observation = encode_observation(tokenizer, seen)
        learnt = [*tokenizer.encode(said), tokenizer.eos_id]
        ids += observation + learnt
        mask += [0] * len(observation) + [1] * len(learnt)
    return ids, mask


def make_response(reasoning: str, answer: str) -> str:
    """``reasoning</think><answer>ANSWER</answer>``: what a model writes after the prompt."""
    return f"{reasoning}{END_THINK}{ANSWER}{answer}{END_ANSWER}"


def _tokenizer_file(path: str | Path) -> Path:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{path}: a tokenizer folder has a tokenizer.json; got none; give the folder that r1mega prepare wrote (tokenizer/)"
        )
    return file


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
