"""r1mega: pretrain DeepSeek-like mixture-of-experts models and turn them into reasoning models.

The steps of the command line as functions: ``prepare, pretrain, sft, rl, eval, export, convert, recipe, report, chat`` in
``r1mega.api``. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
