"""Wrong inputs of every command, one table: what is typed, and the whole line that answers it. The test beside it runs them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re

PRETRAIN = "pretrain out=F/new data.train={F/text:1} data.sequence_length=32 trainer.steps=2 optim.warmup_steps=0 trainer.micro_batch_size=4"
SFT = "sft out=F/new init=F/checkpoint data.train={F/samples:1} data.sequence_length=64 trainer.steps=2 optim.warmup_steps=0"
LOOP = "rl out=F/new init=F/checkpoint rl.rollouts=2 optim.warmup_steps=0"
RL = f"{LOOP} data.problems=F/good.jsonl"
EVAL = "eval out=F/new checkpoint=F/checkpoint data.problems=F/good.jsonl"
RECIPE = "recipe out=F/new --config-dir F/mine"
MINE = f"{PRETRAIN} --config-dir F/mine"
RANK = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TUNABLE = "use one of expert_bias_update_rate, seq_aux_loss_coef, mtp_loss_coef"
REWARDS = "use one of accuracy, format, language, length, repetition"
ALONE = "start the ranks with torchrun or launch.processes=N, or unset RANK WORLD_SIZE"


@dataclasses.dataclass(frozen=True)
class Row:
    """``arguments``: words of a command line, F for the folder, then arguments with spaces of their own. ``lines``: stderr, ``...``

    for anything. ``env``: variables of the call. ``heavy``: the fault cannot be told before torch is imported.
    """

    words: str
    lines: str
    extra: tuple[str, ...] = ()
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    heavy: bool = False

    def arguments(self, folder: str) -> list[str]:
        return [re.sub(r"\bF(?=/)", lambda _: folder, word) for word in (*self.words.split(), *self.extra)]


def row(words: str, lines: str, *extra: str, heavy: bool = False, **env: str) -> Row:
    return Row(words, lines, extra, env, heavy)


# fmt: off
ROWS = [
    # The command and its flags.
    row("pretrane", "command: no such command; got 'pretrane'; did you mean pretrain? use one of prepare, pretrain, ..."),
    row("out=x pretrain", "command: no such command; got 'out=x'; use one of prepare, pretrain, ..."),
    row("pretrane --help", "command: no such command; got 'pretrane'; did you mean pretrain? ..."),
    row("-m pretrane seed=1,2", "command: no such command; got 'pretrane'; did you mean pretrain? ..."),
    row(f"{PRETRAIN} --frob", "arguments: group=choice or key=value; got '--frob'; the only flags are --help, --config-dir DIR, --cfg job, -m"),
    row(f"{PRETRAIN} --cfg", "--cfg: a flag with a value; got none; write --cfg job"),
    row(f"{PRETRAIN} --cfg=", "--cfg: a flag with a value; got none; write --cfg job"),
    row(f"{PRETRAIN} --cfg all", "--cfg: job, the config of the command; got 'all'; write --cfg job"),
    row(f"{PRETRAIN} --cfg job -m", "--cfg: the config of one job; got -m too; leave one of them out"),
    row(f"{PRETRAIN} --cfg job model.top_k=20", "model.top_k: at most model.num_experts 16; got 20; use model.top_k=4"),
    row(f"{PRETRAIN} --config-dir", "--config-dir: a flag with a value; got none; write --config-dir DIR"),
    row(f"{PRETRAIN} --config-dir=", "--config-dir: a flag with a value; got none; write --config-dir DIR"),
    row(f"{PRETRAIN} --config-dir F/nowhere", "--config-dir: a folder of YAML files; got 'F/nowhere'; check the path"),
    row(f"{PRETRAIN} --config-dir F/file", "--config-dir: a folder of YAML files; got 'F/file'; check the path"),
    # The grammar of arguments.
    row(f"{PRETRAIN} trainer.steps", "arguments: group=choice or key=value, nothing positional; got 'trainer.steps'; write key=trainer.steps"),
    row(f"{PRETRAIN} =3", "arguments: a key of letters, digits, _ and dots; got '=3'; write KEY=VALUE"),
    row(PRETRAIN, "arguments: a key of letters, digits, _ and dots; got 'a b=3'; write KEY=VALUE", "a b=3"),
    row(PRETRAIN, r"arguments: a key of letters, digits, _ and dots; got 'a\nb=3'; write KEY=VALUE", "a\nb=3"),
    row(f"{PRETRAIN} ümlaut=1", "arguments: a key of letters, digits, _ and dots; got 'ümlaut=1'; write KEY=VALUE"),
    row(f"{PRETRAIN} trainer..steps=1", "arguments: a key of letters, digits, _ and dots; got 'trainer..steps=1'; write KEY=VALUE"),
    row(f"{PRETRAIN} data.train.=1", "arguments: a key of letters, digits, _ and dots; got 'data.train.=1'; write KEY=VALUE"),
    row(f"{PRETRAIN} trainer.steps==3", "trainer.steps: a value in Hydra's grammar; got 'trainer.steps==3' (extraneous input '='); write trainer.steps=VALUE, a text ..."),
    row(f"{PRETRAIN} trainer.steps=[1", "trainer.steps: a value in Hydra's grammar; got 'trainer.steps=[1' (...); write trainer.steps=[A,B], texts with signs in quotes"),
    row(f"{PRETRAIN} data.train={{F/text}}", "data.train: a value in Hydra's grammar; got 'data.train={F/text}' (...); write data.train={A: 1}, texts ..."),
    row(f"{PRETRAIN} name='x", "name: a value in Hydra's grammar; got \"name='x\" (...); write name=VALUE, a text with signs as name='\"...\"'"),
    row(f"{PRETRAIN} optim.lr=1,2", "optim.lr: one value; got '1,2'; for a list write optim.lr=[a,b], ... add -m"),
    row(f"{PRETRAIN} hydra.run.dir=x", "hydra.run.dir: a key of the command; got one of Hydra's own; leave it out (runs write to out=FOLDER)"),
    row(f"{PRETRAIN} hydra.searchpath=3", "hydra.searchpath: a list of folders; got 3; leave it out and give --config-dir DIR"),
    row(f"{PRETRAIN} hydra.searchpath=[F/nowhere]", "hydra.searchpath: a list of folders; got [F/nowhere]; leave it out and give --config-dir DIR"),
    row(f"{PRETRAIN} ~optim.lr", "optim.lr: a fixed key; got '~optim.lr'; give it a value instead, optim.lr=..."),
    row(f"{PRETRAIN} +optim.lr=1", "optim.lr: a key that is there; got it with +; write optim.lr=VALUE, without +"),
    row(PRETRAIN, "optim.lr: an interpolation names a key; got Interpolation key 'nothing' not found; check ${...}", "optim.lr=${nothing}"),
    row(PRETRAIN, "optim.lr: an interpolation names a key; got Recursive interpolation detected; check ${...}", "optim.lr=${optim.lr}"),
    row(PRETRAIN, "optim.lr: an interpolation names a key; got KeyError ... 'NO_SUCH' not found\"; check ${...}", "optim.lr=${oc.env:NO_SUCH}"),
    # Keys and choices.
    row(f"{PRETRAIN} optim.weight_decy=1", "optim.weight_decy: no such key of pretrain; got 'optim.weight_decy=1'; did you mean optim.weight_decay? see r1mega pretrain --help"),
    row(f"{PRETRAIN} lr=1", "lr: no such key of pretrain; got 'lr=1'; did you mean optim.lr? see r1mega pretrain --help"),
    row(f"{PRETRAIN} +new=1", "new: no such key of pretrain; got '+new=1'; see r1mega pretrain --help"),
    row(f"{PRETRAIN} trainer.steps.x=1", "trainer.steps.x: no such key of pretrain; got 'trainer.steps.x=1'; did you mean trainer.steps? ..."),
    row(PRETRAIN, "trainer.stps: no such key of pretrain; got Key 'stps' not in 'TrainerConfig'; did you mean trainer.steps? ...", "trainer={steps: 3, stps: 4}"),
    row(f"{SFT} data.packing=windows", "data.packing: no such key of sft; got 'data.packing=windows'; ... see r1mega sft --help"),
    row(f"{RL} sampling.temperature=1", "sampling.temperature: no such key of rl; got 'sampling.temperature=1'; did you mean rl.sampling.temperature? ..."),
    row(f"{RL} advantage.scale=1", "advantage.scale: no such key of rl; got 'advantage.scale=1'; did you mean advantage.scale_by_std? ..."),
    row("report run=F/run device=cuda", "device: no such key of report; got 'device=cuda'; see r1mega report --help"),
    row("compare runs=F/run", "runs: no such key of compare; got 'runs=F/run'; did you mean run? see r1mega compare --help"),
    row("doctor jsn=true", "jsn: no such key of doctor; got 'jsn=true'; did you mean json? see r1mega doctor --help"),
    row("prepare problems.a.num_tran=3", "problems.a.num_tran: no such key of prepare; got ...; did you mean problems.a.num_train? ..."),
    row(f"{PRETRAIN} model=tini", "model: no such choice; got 'tini'; did you mean tiny? use one of deepseek_v2_lite, deepseek_v3, moonlight_16b, small, tiny"),
    row(f"{PRETRAIN} model=null", "model: a choice is a name; got 'model=null'; use one of deepseek_v2_lite, ..."),
    row(f"{PRETRAIN} device=gpu", "device: no such choice; got 'gpu'; did you mean cpu? use one of cpu, cuda"),
    row(f"{PRETRAIN} precision=fp16", "precision: no such choice; got 'fp16'; did you mean bf16? use one of bf16, fp32"),
    row(f"{RL} reward=r2", "reward: no such choice; got 'r2'; did you mean r1? use one of r1, r1_language"),
    row(f"{RL} advantage=grop", "advantage: no such choice; got 'grop'; did you mean grpo? use one of ..."),
    row("rl --help advantage=grop", "advantage: no such choice; got 'grop'; did you mean grpo? use one of ..."),
    row("chat checkpoint=F/checkpoint engine=vllm", "engine: no such choice; got 'vllm'; use one of ..."),
    row("recipe recipe=quickstrat", "recipe: no such choice; got 'quickstrat'; did you mean quickstart? use one of quickstart"),
    row("recipe", "recipe: a choice is needed; got none; give recipe=NAME, one of quickstart"),
    row(f"{RL} advantage=no_such.X", "advantage: a dotted choice is imported; got 'no_such.X' (No module named 'no_such'); check PYTHONPATH and the name"),
    row("rl --help advantage=no_such.X", "advantage: a dotted choice is imported; got 'no_such.X' (No module named 'no_such'); check PYTHONPATH and the name"),
    row(f"{RL} advantage=with_syntax_fault.X", "advantage: a dotted choice is imported; got 'with_syntax_fault.X' (SyntaxError: ...); check PYTHONPATH and the name"),
    row(f"{RL} advantage=that_raises.X", "advantage: a dotted choice is imported; got 'that_raises.X' (RuntimeError: boom); check PYTHONPATH and the name"),
    row(f"{RL} advantage=json.loads", "advantage: a choice is a frozen dataclass; got json.loads, a function; add @dataclass(frozen=True)"),
    row(f"{RL} advantage=.X", "advantage: a dotted choice is MODULE.CLASS; got '.X'; write advantage=MODULE.CLASS"),
    # Types and ranges.
    row(f"{PRETRAIN} trainer.steps=many", "trainer.steps: a whole number (steps); got 'many'; write trainer.steps=10"),
    row(f"{PRETRAIN} trainer.steps=1e400", "trainer.steps: a whole number (steps); got '1e400'; write trainer.steps=10"),
    row(f"{PRETRAIN} trainer.steps={'x' * 5000}", "trainer.steps: a whole number (steps); got 'xxx...... (5002 characters); write trainer.steps=10"),
    row(f"{PRETRAIN} trainer.steps={'9' * 400}", "trainer.steps: a whole number of at most 9223372036854775807; got one of about ... digits; give a smaller trainer.steps"),
    row(f"{PRETRAIN} optim.lr=null", "optim.lr: a number; got 'null'; for example optim.lr=0.00022"),
    row(f"{PRETRAIN} optim.lr=1e400", "optim.lr: a finite number; got inf; give a number (1)"),
    row(f"{PRETRAIN} optim.lr=-1", "optim.lr: above 0; got -1.0; use optim.lr=0.00022"),
    row(f"{PRETRAIN} trainer=null", "trainer: a section; got 'null'; give its keys, trainer.KEY=value"),
    row(f"{PRETRAIN} seed=-1", "seed: at least 0; got -1; use seed=1"),
    row(f"{PRETRAIN} seed={10**20}", "seed: a whole number of at most 9223372036854775807; got 100000000000000000000; give a smaller seed"),
    row(f"{PRETRAIN} name=", "name: a name below runs/, without ..; got ''; use name=run"),
    row(f"{PRETRAIN} name='..'", "name: a name below runs/, without ..; got ..; use name=run"),
    row(f"{PRETRAIN} device.kind=tpu", "device.kind: one of cpu, cuda; got tpu; use device.kind=cpu"),
    row(f"{PRETRAIN} data.packing=", "data.packing: one of windows, documents, isolated; got ''; use data.packing=windows"),
    row(PRETRAIN, r"data.packing: one of windows, documents, isolated; got 'a\nb'; use data.packing=windows", "data.packing='a\nb'"),
    row(f"{PRETRAIN} trainer.on_spike=panic", "trainer.on_spike: one of skip, rollback, stop; got panic; use trainer.on_spike=skip"),
    row("export checkpoint=F/checkpoint dtype=fp8", "dtype: one of as_is, fp32, bf16; got fp8; use dtype=as_is"),
    row("chat checkpoint=F/checkpoint sampling.temperature=11", "sampling.temperature: from 0 to 10; got 11.0; use sampling.temperature=1.0"),
    row("doctor timeout_seconds=0", "timeout_seconds: at least 1; got 0.0; use timeout_seconds=180.0"),
    row("timeline ranks=0", "ranks: at least 1; got 0; use ranks=4"),
    row("timeline pipeline=dualpipev microbatches=3", "microbatches: at least 2 for each of the 4 pipeline ranks with pipeline=dualpipev; got 3; use microbatches=8"),
    row("completion shell=ksh", "shell: one of bash, zsh, fish; got ksh; use shell=bash"),
    row("completion bash", "arguments: group=choice or key=value, nothing positional; got 'bash'; write key=bash"),
    row("prepare text=stdlib", "text: a list; got 'stdlib'; write text=[a,b]"),
    row("prepare text=[null]", "text: a list; got '[null]'; write text=[a,b]"),
    row("chat", "checkpoint: a value is needed (checkpoint to talk to, unit path); got none; give checkpoint=VALUE"),
    row("chat checkpoint=null", "checkpoint: text; got 'null'; write checkpoint=PATH"),
    # Rules across keys.
    row(f"{PRETRAIN} model.num_heads=6 parallel.tensor=4 launch.processes=4", "model.num_heads: a multiple of parallel.tensor 4; got 6; use parallel.tensor=1 or 2, or model.num_heads=4 or 8"),
    row(f"{PRETRAIN} model.top_k=20", "model.top_k: at most model.num_experts 16; got 20; use model.top_k=4"),
    row(f"{PRETRAIN} model.num_groups=3", "model.num_groups: divides model.num_experts 16; got 3; use model.num_groups=2, 4 or 8"),
    row(f"{PRETRAIN} model.score_function=softmax", "model.top_k: 1 x model.topk_groups 2, since ...; got 4; use model.top_k=2, or model.topk_groups=4\nmodel.use_expert_bias: false with the softmax gate; got true; use model.use_expert_bias=false"),
    row(f"{PRETRAIN} model.qk_rope_head_dim=7", "model.qk_rope_head_dim: even, rotary positions turn pairs; got 7; use model.qk_rope_head_dim=6 or 8"),
    row(f"{PRETRAIN} data.sequence_length=99999", "data.sequence_length: at most model.max_position_embeddings 2048; got 99999; use data.sequence_length=2048"),
    row(f"{PRETRAIN} trainer.global_batch_size=6", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 4 x 1 data ranks; got 6; use trainer.global_batch_size=4 or 8, or trainer.micro_batch_size=2, 3 or 6"),
    row(f"{PRETRAIN} optim.min_lr=1", "optim.min_lr: at most optim.lr 0.00022; got 1.0; use optim.min_lr=2.2e-05, or optim.decay=constant"),
    row(f"{PRETRAIN} optim.warmup_steps=5", "optim.warmup_steps: at most the run's 2 steps (trainer.steps); got 5; use optim.warmup_steps=0"),
    row(f"{PRETRAIN} optim.batch_ramp_start=4", "optim.batch_ramp_start: batch_ramp_start and batch_ramp_steps are both 0 or both above 0; got 4 and 0; use optim.batch_ramp_start=0"),
    row(f"{PRETRAIN} parallel.expert=3 launch.processes=3 trainer.global_batch_size=36", "parallel.expert: divides model.num_experts 16; got 3; use parallel.expert=1"),
    row(f"{PRETRAIN} parallel.tensor=2", "parallel: tensor x pipeline x context divides launch.processes 1; got 2 x 1 x 1 = 2; use parallel.tensor=1, or launch.processes=2"),
    # Axes, dispatcher, schedule, balance.
    row(f"{PRETRAIN} parallel=pp3", "parallel: no such choice; got 'pp3'; did you mean ...? use one of cp2, cp2_ep2, ..."),
    row(f"{PRETRAIN} parallel=pp4", "parallel: tensor x pipeline x context divides launch.processes 1; got 1 x 4 x 1 = 4; use parallel.pipeline=1, or launch.processes=4"),
    row(f"{PRETRAIN} pipeline=2", "pipeline: no such choice; got '2'; use one of 1f1b, dualpipev, interleaved, none, zb1p"),
    row(f"{PRETRAIN} pipeline=zb1", "pipeline: no such choice; got 'zb1'; did you mean zb1p? use one of 1f1b, dualpipev, interleaved, none, zb1p"),
    row(f"{PRETRAIN} pipeline=interleaved pipeline.chunks=1", "pipeline.chunks: at least 2; got 1; use pipeline.chunks=2"),
    row(f"{PRETRAIN} pipeline=none parallel.pipeline=2 launch.processes=2", "parallel.pipeline: 1 with pipeline=none, which cuts the model into no stages; got 2; use parallel.pipeline=1, or pipeline=1f1b"),
    row(f"{PRETRAIN} parallel.pipeline=8 launch.processes=8", "parallel.pipeline: at most model.num_layers 4; got 8; use parallel.pipeline=1, 2 or 4, or model.num_layers=8"),
    row(f"{PRETRAIN} pipeline=interleaved parallel.pipeline=4 launch.processes=4", "parallel.pipeline: at most a stage a layer: parallel.pipeline x 2 stages a rank is at most model.num_layers 4; got 4 x 2 = 8; use parallel.pipeline=1 or 2, or model.num_layers=8"),
    row(f"{PRETRAIN} pipeline=interleaved parallel=pp2 launch.processes=2 trainer.global_batch_size=12", "trainer.global_batch_size: a multiple of trainer.micro_batch_size 4 x 1 data ranks x parallel.pipeline 2, for pipeline=interleaved; got 12; use trainer.global_batch_size=8 or 16, or trainer.micro_batch_size=2, 3 or 6"),
    row(f"{SFT} pipeline=dualpipev parallel=pp4 launch.processes=4", "trainer.global_batch_size: at least 8 microbatches of trainer.micro_batch_size 8 x 1 data ranks, for pipeline=dualpipev with parallel.pipeline 4; got 32; use trainer.global_batch_size=64, or trainer.micro_batch_size=1, 2 or 4"),
    row(f"{PRETRAIN} parallel=pp2 launch.processes=2 parallel.stages=Ettt|mL", "parallel.stages: as many t as model.num_layers, 4; got Ettt|mL (3); use parallel.stages=null, or 'parallel.stages=Ettt|tmL'"),
    row(f"{PRETRAIN} parallel=pp2 launch.processes=2 parallel.stages=Ett,ttmL", "parallel.stages: one value; got 'Ett,ttmL'; for a list write parallel.stages=[a,b], ..."),
    row(f"{SFT} parallel=cp2 launch.processes=2 data.sequence_length=62", "data.sequence_length: a multiple of 4, which tensor and context parallel cut it into; got 62; use data.sequence_length=60 or 64"),
    row(f"{PRETRAIN} parallel.expert=4 launch.processes=2", "parallel: expert x expert_tensor x pipeline divides launch.processes 2; got 4 x 1 x 1 = 4; use parallel.expert=1 or 2, or launch.processes=4"),
    row(f"{PRETRAIN} parallel.expert_tensor=3 launch.processes=3 trainer.global_batch_size=36", "parallel.expert_tensor: divides model.moe_ffn_size 64; got 3; use parallel.expert_tensor=1"),
    row(f"{PRETRAIN} dispatcher=all2all", "dispatcher: no such choice; got 'all2all'; did you mean alltoall? use one of allgather, alltoall, deepep, local"),
    row(f"{PRETRAIN} dispatcher=local parallel=ep2 launch.processes=2", "parallel.expert: 1 with dispatcher=local, whose tokens stay on their rank; got 2; use parallel.expert=1, or dispatcher=alltoall"),
    row(f"{PRETRAIN} dispatcher=deepep parallel=ep2 launch.processes=2", "dispatcher: deepep needs GPUs, device=cuda; got deepep with device=cpu; use dispatcher=alltoall"),
    row(f"{PRETRAIN} balance=eplb trainer.save_every=5 launch.processes=2", "parallel.expert: above 1 with balance=eplb, which moves experts between ranks; got 1; use parallel.expert=2, or balance=none"),
    row(f"{RL} pipeline=1f1b", "pipeline: no such key of rl; got 'pipeline=1f1b'; did you mean parallel.pipeline? see r1mega rl --help"),
    row(f"{RL} parallel.tensor=2 launch.processes=2", "parallel.tensor: 1, every rank of this command holds whole weights; got 2; use parallel.tensor=1"),
    row(f"{EVAL} parallel=cp2 launch.processes=2", "parallel.context: 1, every rank of this command holds whole weights; got 2; use parallel.context=1"),
    row(f"{RL} rl.prompts_per_rollout=3 launch.processes=2", "rl.prompts_per_rollout: a multiple of the 2 data ranks; got 3; use rl.prompts_per_rollout=2 or 4"),
    row(f"{RL} rl.updates_per_rollout=7", "rl.updates_per_rollout: divides the 512 responses of a rollout ...; got 7; use rl.updates_per_rollout=2, 4 or 8"),
    row(f"{RL} rl.sampling.temperature=0", "rl.sampling.temperature: above 0, ...; got 0; use rl.sampling.temperature=1.0"),
    row("chat checkpoint=F/checkpoint launch.processes=2", "launch.processes: 1, a conversation has one terminal; got 2; use launch.processes=1"),
    row(f"{SFT} model.top_k=2", f"model.top_k: a field that alters no weight, the checkpoint decides the others; got 2; ...{TUNABLE}"),
    row(f"{RL} model.expert_bias_rate=1", f"model.expert_bias_rate: a field that alters no weight, ...; got 1; did you mean expert_bias_update_rate? {TUNABLE}"),
    # Rewards.
    row(f"{RL} reward.weights.acuracy=1", f"reward.weights: a registered reward; got 'acuracy'; did you mean accuracy? {REWARDS}"),
    row(RL, "reward.weights.accuracy: a number; got '{accuracy: high}'; write reward.weights={accuracy: 1}", "reward.weights={accuracy: high}"),
    row(RL, "reward.weights: a dotted reward is imported; got 'no_such.X'; No module named 'no_such', check PYTHONPATH and the name", "reward.weights={no_such.X: 1}"),
    row(RL, "reward.weights: a dotted reward is imported; got 'that_raises.X'; boom, check PYTHONPATH and the name", "reward.weights={that_raises.X: 1}"),
    row(RL, f"reward.by_source[gsm*]: a registered reward; got 'acuracy'; did you mean accuracy? {REWARDS}", "reward.by_source={gsm*: {acuracy: 1}}"),
    row(RL, "reward.by_source: a pattern matches the source of a problem; got 'gsm8k', which matches none; ...the sources are ...", "reward.by_source={gsm8k: {accuracy: 1}}"),
    row(f"{EVAL} reward.options.accuracy.frob=1", "reward.options.accuracy: a knob of the reward; got 'frob'; use one of longest_answer"),
    # Token files and tokenizers.
    row(f"{PRETRAIN} data.valid=F/texd", "data.valid: a token file: NAME.json with NAME.bin and NAME.idx; got no such path F/texd.json; did you mean F/text.json? check the path or make it first"),
    row(f"{PRETRAIN} data.valid=F/text.bin", "data.valid: a token file is named without suffix; got F/text.bin; use F/text"),
    row(f"{PRETRAIN} data.train={{F/text:0}}", "data.train: a weight above 0 for F/text; got 0.0; give a positive weight or leave the file out"),
    row(f"{PRETRAIN} data.train={{F/text:lots}}", "data.train.F/text: a number; got '{F/text:lots}'; write data.train={F/text: 1}"),
    row(f"{PRETRAIN} data.train=F/text", "data.train: a mapping; got 'F/text'; write data.train={name:value}"),
    row(f"{PRETRAIN} data.train={{F/samples:1}}", "data.train: a token file of kind text; got F/samples of kind samples; pretrain reads text files ..."),
    row(f"{SFT} data.train={{F/text:1}}", "data.train: a token file of kind samples; got F/text of kind text; pretrain reads text files ..."),
    row(f"{PRETRAIN} model.vocab_size=100", "model.vocab_size: at least the 512 entries of the tokenizer of F/text; got 100; use model.vocab_size=512"),
    row(f"{PRETRAIN} data.valid=F/cut_bin", "data.valid: F/cut_bin.bin has 2440 bytes; got 10 bytes; copy or prepare it again"),
    row(f"{PRETRAIN} data.valid=F/cut_idx", "data.valid: F/cut_idx.idx has 168 bytes; got 5 bytes; copy or prepare it again"),
    row(f"{SFT} data.valid=F/cut_mask", "data.valid: F/cut_mask.mask has 1220 bytes; got 7 bytes; copy or prepare it again"),
    row(f"{PRETRAIN} data.valid=F/half_json", "data.valid: F/half_json.json is the meta of a token file; got JSONDecodeError ...; prepare it again"),
    row(f"{PRETRAIN} data.valid=F/odd_kind", "data.valid: F/odd_kind.json is the meta of a token file; got KeyError 'pictures'; prepare it again"),
    row(f"{PRETRAIN} tokenizer=F/tok_half", "tokenizer: F/tok_half/tokenizer.json is a BPE tokenizer; got JSONDecodeError ...; prepare it again"),
    row(f"{PRETRAIN} tokenizer=F/tok_big", "model.vocab_size: at least the 600 entries of the tokenizer F/tok_big; got 512; use model.vocab_size=600"),
    row(f"{PRETRAIN} tokenizer=F/folder", "tokenizer: a folder with tokenizer.json; got no such path F/folder/tokenizer.json; check the path or make it first"),
    row(f"{PRETRAIN} tokenizer=''", "tokenizer: a path; got ''; give tokenizer=PATH"),
    row(f"{PRETRAIN} tokenizer=hf:gpt2", "tokenizer: hf:OWNER/NAME[@REVISION][:CONFIG/SPLIT]; got 'hf:gpt2'; write tokenizer=hf:OWNER/NAME"),
    # Problems and text.
    row(f"{LOOP}", "data.problems: a value is needed (JSONL of problems, unit path); got none; give data.problems=VALUE"),
    row(f"{LOOP} data.problems=F/not_json.jsonl", "F/not_json.jsonl line 2: each line is one JSON object; got '{half' (...); mend or drop the line"),
    row(f"{LOOP} data.problems=F/deep.jsonl", "F/deep.jsonl line 1: each line is one JSON object; got '[[[...' (...); mend or drop the line"),
    row(f"{LOOP} data.problems=F/latin.jsonl", "F/latin.jsonl line 1: each line is one JSON object; got ... can't decode byte ...; mend or drop the line"),
    row(f"{LOOP} data.problems=F/no_answer.jsonl", "F/no_answer.jsonl line 2: a problem has an answer in final_answer, ...; got columns question; add the answer, drop the line or set answer_column"),
    row(f"{LOOP} data.problems=F/no_question.jsonl", "F/no_question.jsonl line 1: a problem has a question in question, ...; got columns answer; set question_column"),
    row(LOOP, "F/ünï cödé.jsonl line 1: a problem has a question in ...; got columns answer; set question_column", "data.problems='F/ünï cödé.jsonl'"),
    row(f"{LOOP} data.problems=F/empty.jsonl", "data.problems: a JSONL or Parquet file with at least one record; got an empty file F/empty.jsonl; write it again"),
    row(f"{LOOP} data.problems=F/blank.jsonl", "F/blank.jsonl: a problem file holds at least one problem; got an empty file; check the path"),
    row(f"{LOOP} data.problems=F/goood.jsonl", "data.problems: a JSONL or Parquet file; got no such path F/goood.jsonl; did you mean F/good.jsonl? check the path or make it first"),
    row(f"{LOOP} data.problems=F/folder", "data.problems: a JSONL or Parquet file, or a folder with some; got a folder F/folder without one; give the file"),
    row(f"{LOOP} data.problems=F/cut.jsonl.gz", "F/cut.jsonl.gz: a whole gzip file; got Compressed file ended ...; copy or compress it again"),
    row(f"{LOOP} data.problems=F/x.parquet.gz", "F/x.parquet.gz: Parquet is compressed inside; got .gz around it; decompress the file"),
    row(f"{LOOP} data.problems=F/x.parquet", "F/x.parquet: a whole Parquet file; got ...; copy or write it again" if importlib.util.find_spec("pyarrow") else "F/x.parquet: pyarrow reads Parquet; got no such package; pip install 'r1mega[parquet]'"),
    row("prepare out=F/new", "prepare: text, problems or sft_from to prepare; got none; set text=[stdlib] or problems=..."),
    row("prepare out=F/new text=['']", "text: a path; got ''; give text=[PATH]"),
    row("prepare out=F/new text=[F/wordz.txt]", "text: a file, a folder, or stdlib; got no such path F/wordz.txt; did you mean F/words.txt? check the path or make it first"),
    row("prepare out=F/new text=[F/latin.txt]", "F/latin.txt: text is UTF-8; got invalid continuation byte at byte 1; convert the file"),
    row("prepare out=F/new text=[F/pictures]", "F/pictures: a folder of text holds UTF-8 files; got none; check the path"),
    row("prepare out=F/new text=[F/good.jsonl] text_column=anser", "F/good.jsonl line 1: the column anser holds text; got columns question, answer; did you mean answer? set text_column"),
    row("prepare out=F/new text=[flie://x]", "text: a protocol that fsspec knows; got flie:// in flie://x; did you mean file? use s3://, gs://, https:// and so on"),
    row("prepare out=F/new text=[hf:gsm8k]", "text: hf:OWNER/NAME[@REVISION][:CONFIG/SPLIT]; got 'hf:gsm8k'; write text=hf:OWNER/NAME"),
    row("prepare out=F/new text=[file://F/god.jsonl]", "text: a file or folder at a URL; got no such file://F/god.jsonl; did you mean file://F/good.jsonl? check the URL"),
    row("prepare out=hf:o/n text=[stdlib]", "out: a path or a URL to write to; got hf:o/n; use a path, out=FOLDER, and copy it when it is done"),
    row("prepare out=F/new problems.a.kind=csv", "problems.a.kind: one of reasoning_gym, file, jsonl; got csv; use problems.a.kind=reasoning_gym"),
    row("prepare out=F/new problems.a.kind=file", "problems.a.path: a source of kind file has a file; got null; give problems.a.path=FILE"),
    row("prepare out=F/new problems.a.path=F/good.jsonl", "problems.a.kind: file, since problems.a.path is F/good.jsonl; got reasoning_gym; use problems.a.kind=file, or problems.a.path=null"),
    row("prepare out=F/new problems.a=3", "problems.a: a section; got '3'; give its keys, problems.a.KEY=value"),
    row("prepare out=F/new sft_from=F/good.jsonl", "F/good.jsonl line 1: a sample has a response with </think>; got columns question, answer; add it or drop the line"),
    # Checkpoints and runs.
    row(f"{SFT} init=F/chekpoint", "init: a checkpoint's folder; got no such path F/chekpoint; did you mean F/checkpoint? check the path or make it first"),
    row("chat checkpoint=F/file", "checkpoint: a checkpoint's folder; got a file F/file; give its folder"),
    row("chat checkpoint=F/nothing_in_it", "checkpoint: a checkpoint's folder; got an empty folder F/nothing_in_it; give a folder that a finished run wrote"),
    row("export checkpoint=F/folder", "checkpoint: a folder with manifest.json, or a run's folder with checkpoints/; got F/folder; check the path"),
    row("chat checkpoint=''", "checkpoint: a path; got ''; give checkpoint=PATH"),
    row("export checkpoint=F/half_state", "checkpoint F/half_state: state.json is readable JSON; got JSONDecodeError; use an older checkpoint"),
    row("export checkpoint=F/other_version", "checkpoint F/other_version: state.json describes a model of this version; got ...'hyper'; use one that this version wrote"),
    row(f"{EVAL} checkpoint=hf:a/b:c", "checkpoint: hf:OWNER/NAME[@REVISION] of a model; got hf:a/b:c; leave out :c"),
    row(f"{PRETRAIN} out=F/run", "checkpoint F/run/checkpoints/step-00000001: it has the run's architecture; got num_experts 32 (model.num_experts=16); use its model or another run name"),
    row(f"{SFT} out=F/run", "out: sft goes on in its own folder; got one that pretrain wrote, F/run/checkpoints/step-00000001; use another name="),
    row("export out=F/new checkpoint=F/checkpoint target=F/folder", "target: a new folder or an earlier export; got F/folder with other files; use another target="),
    row("report run=F/runn", "run: a run's folder; got no such path F/runn; did you mean F/run? check the path or make it first"),
    row("report run=F/folder", "run: a folder with summary.json, eval.json, or lines in metrics.jsonl; got 'F/folder' without a readable one; check the path"),
    row("compare run=F/run", "run: two runs or more; got F/run; give run=A run=B"),
    row("compare run=F/run run=F/run", "run: different runs; got F/run twice; give another folder"),
    row("compare run=F/run run=F/file", "run: a run's folder; got a file F/file; give its folder"),
    # What cannot be written, and devices.
    row(f"{PRETRAIN} out=", "out: a path; got ''; give out=PATH"),
    row(f"{PRETRAIN} out=F/file", "out: a folder that can be written; got a file F/file; give another out=FOLDER"),
    row(f"{PRETRAIN} out=F/file/below", "out: a folder that can be written; got a file F/file in the way of F/file/below; give another out=FOLDER"),
    row(f"{PRETRAIN} out=F/{'x' * 300}", "out: a folder whose names have at most 255 bytes; got one of 300; give another out=FOLDER"),
    row("prepare text=[stdlib] out=/proc/r1mega", "/proc/r1mega: can be read and written; got ...; give another path, or make room or rights there"),
    row("export out=F/new checkpoint=F/checkpoint target=F/file", "target: a folder that can be written; got a file F/file; give another target=FOLDER"),
    row("report run=F/run target=F/file/x.html", "target: a file that can be written; got a file F/file in the way of F/file/x.html; give another target=FILE"),
    row("recipe recipe=quickstart out=s3://b/x", "out: a recipe's folder is on this machine; got s3://b/x; use a path, out=FOLDER, and copy it when it is done"),
    row("recipe recipe=quickstart", "out: a recipe's folder is written into overrides; got 'F/with space'; use letters, digits, / . _ - only", "out='F/with space'"),
    row(f"{RECIPE} recipe=fine device=cuda", "device.kind: torch sees no GPU; got cuda; use device=cpu or install a CUDA build of torch", heavy=True, **RANK, CUDA_VISIBLE_DEVICES=""),
    # Recipes.
    row(f"{RECIPE} recipe=cycle", "recipe.stages: no stage needs itself; got a -> b -> a; remove one of these needs"),
    row(f"{RECIPE} recipe=unknown_need", "recipe.stages.b.needs: no such stage; got 'dat'; did you mean data? use one of data, b"),
    row(f"{RECIPE} recipe=unknown_command", "recipe.stages.a.command: a command that leaves a result; got 'pretrane'; did you mean pretrain? use one of prepare, ..."),
    row(f"{RECIPE} recipe=unknown_place", "recipe.stages.b.overrides: a placeholder is recipe, seed or a needed stage; got {dat}; write {STAGE} of a stage in needs, or add dat to needs"),
    row(f"{RECIPE} recipe=unknown_key", "recipe.stages.a.comand: unknown key; got 'comand'; did you mean command? use one of command, needs, overrides, copy_to"),
    row(f"{RECIPE} recipe=as_list", "recipe: a recipe has stages; got {'stages': ['a']}; choose one, for example recipe=quickstart"),
    row(f"{RECIPE} recipe=needs_text", "recipe.stages.a.needs: a list of text; got 'b'; write needs: [...]"),
    row(f"{RECIPE} recipe=copy_number", "recipe.stages.a.copy_to: a path below the run's folder; got 3; use for example export"),
    row(f"{RECIPE} recipe=copy_twice", "recipe.stages.a.copy_to: each stage its own place; got x twice; change one"),
    row(f"{RECIPE} recipe=bad_stage", "stage a: txt: no such key of prepare; got 'txt=[stdlib]'; did you mean text? see r1mega prepare --help"),
    row(f"{RECIPE} recipe=bad_stage recipe.stages.a.comand=x", "recipe.stages.a.comand: a key that is there; got no such one; write +recipe.stages.a.comand=VALUE to add it"),
    row(f"{RECIPE} recipe=bad_stage only=[b]", "only: no such stage; got 'b'; use one of a"),
    row(f"{RECIPE} recipe=tab", "F/mine/recipe/tab.yaml: YAML; got found character ... in line 2; correct it"),
    # YAML files of one's own.
    row(f"{MINE} model=broken", "F/mine/model/broken.yaml: YAML; got expected ',' or ']', ... in line 2; correct it"),
    row(f"{MINE} model=binary", "F/mine/model/binary.yaml: YAML files are UTF-8; got invalid start byte; save it as UTF-8"),
    row(f"{MINE} model=unknown", "model.num_expert: no such key of pretrain; got Key 'num_expert' not in 'ModelConfig'; did you mean model.num_experts? ..."),
    row(f"{MINE} model=typed", "model.num_experts: a whole number (experts); got Value 'many' ...; for example model.num_experts=32"),
    row(f"{MINE} model=as_list", "model/as_list.yaml: a mapping of its group's keys; got ... list is not a subclass of ModelConfig. ...; correct that file"),
    row(f"{MINE} model=bad_default", "model/bad_default.yaml: a mapping of its group's keys; got Could not load 'model/gone'.; correct that file"),
    row(f"{RL} --config-dir F/mine reward=odd", f"reward.weights: a registered reward; got 'acuracy'; did you mean accuracy? {REWARDS}"),
    # Sweeps.
    row(f"-m {PRETRAIN} optim.lr=1,x", "job optim.lr=x: optim.lr: a number; got 'x'; for example optim.lr=0.00022"),
    row(f"-m {PRETRAIN} seed=range(0,1,0)", "seed: values of a sweep; got range(0,1,0) (...); write seed=a,b"),
    row(f"-m {PRETRAIN} seed=range(0,5000)", "-m: at most 1000 jobs a sweep; got 1001 or more; take fewer values or several sweeps"),
    row(f"-m {PRETRAIN} optim.lr=interval(0,1)", "optim.lr: values that can be counted; got interval(0,1); write optim.lr=a,b or optim.lr=range(START,STOP,STEP)"),
    row(f"-m {PRETRAIN} model=glob(x*)", "model: at least one value of a sweep; got glob(x*), which has none; write model=a,b"),
    row("-m report run=a,b", "-m: a command whose runs have a folder; got report; leave -m out"),
    row(f"-m {PRETRAIN} seed=1,2", "-m: a sweep starts its own processes; got RANK=0; use launch.processes, not torchrun", RANK="0"),
    # Variables.
    row(PRETRAIN, f"WORLD_SIZE: set where RANK is; got RANK=0 without it; {ALONE}", RANK="0"),
    row(PRETRAIN, f"RANK: set where WORLD_SIZE is; got WORLD_SIZE=2 without it; {ALONE}", WORLD_SIZE="2"),
    row(PRETRAIN, f"RANK: below WORLD_SIZE 2; got 3; {ALONE}", **RANK | {"RANK": "3"}),
    row(PRETRAIN, "WORLD_SIZE: a whole number from 1 on; got 'two'; unset WORLD_SIZE, or start with torchrun", **RANK | {"WORLD_SIZE": "two"}),
    row("prepare text=[stdlib]", "RANK: a whole number from 0 on; got ''; unset RANK, or start with torchrun", **RANK | {"RANK": ""}),
    row(PRETRAIN, "LOCAL_RANK: a whole number from 0 on; got '-1'; unset LOCAL_RANK, or start with torchrun", LOCAL_RANK="-1"),
    row(PRETRAIN, "MASTER_PORT: a port of rank 0's machine; got none; export MASTER_PORT=..., or start with torchrun, which sets it", **RANK | {"MASTER_PORT": ""}),
    row(PRETRAIN, "MASTER_PORT: a port of rank 0's machine, from 1 to 65535; got '99999'; export MASTER_PORT=29500, or start with torchrun", **RANK | {"MASTER_PORT": "99999"}),
    row("prepare out=F/new text=[file://F/words.txt]", "R1MEGA_CACHE: a folder for copies; got F/file (Not a directory); set R1MEGA_CACHE=FOLDER", R1MEGA_CACHE="F/file"),
]
# fmt: on
