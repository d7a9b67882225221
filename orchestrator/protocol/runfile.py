"""The run file: what a user asks for. `kubectl apply` will take the same text later.

Field names on disk are camelCase; durations are text with a unit (`10s`, `1.5m`, `200ms`, `2h`).
Reading YAML, naming the nearest field for a misspelt one, and checking what must fit together
are the business of `orchestrator.compose`; here stand the shapes and the defaults.
"""

from __future__ import annotations

import re
from math import gcd
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.layout import Layout

API_VERSION = "holdfast.dev/v1alpha1"
EMBEDDED = "trainer.train:main"
"""The entrypoint of the trainer that comes with holdfast."""
_OF_A_RANK = ("trainer", "parallelism", "checkpoint", "detection")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z", max_length=63)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Duration = str


def seconds(duration: str) -> float:
    """Return the length of a duration in seconds.

    Raises:
        ValueError: if the text is not a number followed by ms, s, m or h.

    >>> seconds("1.5m")
    90.0
    """
    match = _DURATION.fullmatch(duration.strip())
    if match is None:
        raise ValueError(
            f"duration is {duration!r}, expected a number and a unit: 10s, 500ms, 2m, 1h"
        )
    return float(match[1]) * _UNIT_S[match[2]]


class _Section(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """A section of a file: unknown fields are refused, since a misspelt one would do nothing."""


class Metadata(_Section, frozen=True, kw_only=True):
    """Who this run is."""

    name: Name
    """Of the run and of its folder: lower-case letters, digits and dashes."""


class Nodes(_Section, frozen=True, kw_only=True):
    """How many machines, and how many stand by."""

    count: Positive = 1
    """Machines that the world has seats on."""
    ranks_per_node: Positive = 1
    """Ranks of each machine; as many as it has GPUs."""
    spares: NonNegative = 0
    """Machines more, warm, which take the place of others."""
    serials: dict[str, str] = {}
    """Who a node's machine is, by the node's name, where it can not tell that by itself or many
    machines say the same: `{node-0: rack7-u12}`. Verdicts about devices go by it."""


class Parallelism(_Section, frozen=True, kw_only=True):
    """How the world is cut; the product must equal the number of ranks.

    Rank order, slowest first: dpReplicate, pp, dpShard, cp, tp.
    """

    dp_replicate: Positive = 1
    """Copies of the whole state, each trained on a share of the batch."""
    dp_shard: Positive | None = None
    """Default: whatever ranks the other dimensions leave."""
    tp: Positive = 1
    """Tensor parallelism: ranks that share every layer, and each sequence between layers."""
    pp: Positive = 1
    """Pipeline parallelism: ranks that have layers of their own, one after the other."""
    cp: Positive = 1
    """Context parallelism: ranks that share every sequence, and exchange heads for attention."""

    def layout(self, world_size: int) -> Layout:
        """Return the sizes of all dimensions, in a world of so many ranks."""
        fixed = self.pp * self.dp_replicate * self.cp * self.tp
        shard = self.dp_shard or max(world_size // fixed, 1)
        return Layout(self.dp_replicate, self.pp, shard, self.cp, self.tp)


class DataSource(_Section, frozen=True, kw_only=True):
    """Documents of one kind, and how much of what is trained on comes from them."""

    uri: str
    """A file, a folder or a glob of .txt, .py, .md, .jsonl or .parquet; an fsspec address works
    too (`s3://...`, `https://...`), and is looked up on every node."""
    weight: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)] = 1.0
    """Samples of this source go into the mixture in proportion to it, whatever its size."""
    format: Literal["text", "jsonl", "parquet"] | None = None
    """Default: what the ends of the files' names say."""
    field: Annotated[str, msgspec.Meta(min_length=1)] = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the text."""


class Data(_Section, frozen=True, kw_only=True):
    """What is trained on: documents of several sources, and how they are mixed."""

    sources: tuple[DataSource, ...]
    """At least one; `[{uri: a.jsonl, weight: 3}, {uri: b/}]` takes three samples of four from
    a.jsonl."""
    validation: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """The share of documents that is never trained on, and that `evalEverySteps` evaluates."""
    shuffle: bool = True
    """Whether the samples of a source come in another order in each epoch, or as they lie."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """What becomes of a document that can not be read: the run stops, or goes on and counts it."""
    cache_gib_max: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How much the tokens of all sources may take of a node's disk; default what is free there."""
    prefetch: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2
    """Micro-batches that a thread reads ahead; 0 reads each when it is needed."""
    wait_max: Duration = "10m"
    """A rank that waits longer than this for its next micro-batch ends."""


class BatchChange(_Section, frozen=True, kw_only=True):
    """Another size of the global batch, for the rest of a run."""

    tokens: Positive
    """It changes with the first step that begins when so many were trained on."""
    global_batch: Positive
    """Samples per optimizer step from then on."""


class LengthChange(_Section, frozen=True, kw_only=True):
    """Another length of sequences, for the rest of a run."""

    tokens: Positive
    """It changes with the first step that begins when so many were trained on."""
    seq_len: Positive
    """Tokens of a sample from then on."""
    micro_batch: Positive | None = None
    """Samples per forward pass of one rank from then on; default as many as before."""


class Trainer(_Section, frozen=True, kw_only=True):
    """What is trained. Without `data`: the demo's text, sources of the standard library."""

    entrypoint: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")] = EMBEDDED
    """`module:function`, called without arguments in a warm process; it calls `worker.serve`."""
    model: str | dict[str, Any] = "debug"
    """`debug`, `8B`, `70B`, `405B`, or the sizes themselves."""
    steps: Positive = 100
    """Optimizer steps of the whole run; the learning rate is a function of them."""
    seq_len: Positive = 128
    """Tokens of a sample, which is what attention can look back to."""
    global_batch: Positive = 8
    """Samples per optimizer step over all ranks."""
    batch_ramp: tuple[BatchChange, ...] = ()
    """Other sizes of the global batch later on: `[{tokens: 252000000, globalBatch: 16}]`."""
    length_ramp: tuple[LengthChange, ...] = ()
    """Other lengths of sequences later on: `[{tokens: 252000000, seqLen: 8192, microBatch: 1}]`."""
    micro_batch: Positive | None = None
    """Samples per forward pass of one rank; default all of its share of a whole world at once, or
    1 if reduction is deterministic."""
    reduction: Literal["fast", "deterministic"] = "fast"
    """How gradients are added up. `deterministic`: in an order that does not depend on the number
    of replicas, so that a run which goes on with fewer of them ends with the same bits. It costs
    time and memory (README)."""
    pipeline_schedule: Literal["1F1B", "interleaved"] = "1F1B"
    """How micro-batches go through the stages of a pipeline, if parallelism.pp is above 1."""
    stages_per_rank: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2
    """Stages of the pipeline that a rank has with `interleaved`; with `1F1B` it is one."""
    seed: NonNegative = 0
    """Of the first weights and of the order of samples. The same seed gives the same bits."""
    init_from: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Weights to begin from, not drawn by `seed`: a folder of Hugging Face's or Meta's layout, as
    path or fsspec address, or of a run. They stay until the run is over (docs/weights.md)."""
    continue_from: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """A checkpoint to go on from with its optimizer, step and place in data: folder of another run,
    with `@STEP` behind it for one that is not the newest. That run may be cut in any other way."""
    data: Data | tuple[str, ...] | str | None = None
    """Files, folders or globs of .txt, .py, .md, .jsonl or .parquet; fsspec addresses work too.
    Or a section, for several sources in a mixture."""
    eval_every_steps: Positive | None = None
    """How often the loss on `data.validation` is computed; default never."""
    eval_samples: Positive = 256
    """Samples of an evaluation, if the validation split has as many."""
    tokenizer: str | None = None
    """A file in tiktoken format; default the small one that comes with holdfast."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 3e-4
    """The highest; after the warm-up it falls along a cosine to a hundredth."""
    warmup_steps: NonNegative = 10
    """So many steps at the beginning, in which the learning rate goes up in a line."""
    anneal_steps: NonNegative = 0
    """So many steps at the end, in which the learning rate goes to 0 in a line."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    """AdamW's, of matrices; gains of norms do not decay."""
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Gradients are scaled down to this norm, over all ranks, where theirs is larger."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What ranks compute on; by itself a GPU for each rank of a node where there are as many."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What layers compute in: by itself fp32 on a CPU and bf16 on a GPU. Weights, sums of gradients
    over ranks and the optimizer are fp32 with either."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of having it kept in memory: nothing, the
    feed-forward of each layer, or all of it."""
    compile: bool | None = None
    """Whether layers go through torch.compile; by itself on a GPU only. The first step, phase
    `warming`, may take minutes then: detection.warmupLimit covers it. Kernels are kept by each node
    of the run, or, for all runs, in the folder that TORCHINDUCTOR_CACHE_DIR names."""
    peak_tflops: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """What MFU is a share of, dense bf16 products of a GPU; by itself the data sheet's figure."""
    positions: Literal["sequence", "document"] = "sequence"
    """Whether positions run on through a sequence, or begin anew with each of its documents. No
    token looks beyond its document, so that changes no more than roundings."""
    options: dict[str, Any] = {}
    """Passed to the entrypoint as written; for trainers that are not the embedded one."""


class Checkpoint(_Section, frozen=True, kw_only=True):
    """Where and how often state is saved."""

    uri: str | None = None
    """Durable tier: a folder, file:///folder or s3://bucket/prefix; default `checkpoints` in the
    run's folder. Options follow after a question mark (storage/FORMAT.md), credentials never do."""
    every: Literal["steps", "auto"] = "steps"
    """`steps`: as often as the two fields below say. `auto`: they are where the run begins; then
    what a save costs and how often the run is interrupted say it, as far as both are seen in this
    run, within the bounds below (policy.cadence)."""
    every_steps: Positive = 50
    """Steps between saves to the durable tier."""
    memory_every_steps: Positive = 5
    """Steps between saves to memory, a node's own and another's."""
    every_min: Duration = "30s"
    """With `auto`, at least so long between two saves to the durable tier."""
    every_max: Duration = "30m"
    """And at most so long: as much may be lost when memory is lost, too."""
    memory_every_min: Duration = "1s"
    """The same for saves to memory."""
    memory_every_max: Duration = "5m"
    """The same for saves to memory: as much may be lost with every interruption."""
    keep_last: Annotated[int, msgspec.Meta(ge=2)] = 3
    """So many of the newest stay on the durable tier."""
    keep_every_steps: NonNegative = 0
    """And every one whose step is a multiple of this; 0: no others."""
    keep_anchors: bool = True
    """And verified ones at distances from the newest that double, so that a corruption that is
    found late has one from before it."""
    scrub_mib_per_second: NonNegative = 64
    """At most so much is read back in the background, to verify what was written; 0: nothing."""


class Detection(_Section, frozen=True, kw_only=True):
    """One number from which every timeout of the system is derived (protocol.timeouts)."""

    detect_within: Duration = "10s"
    """A fault is to be noticed within this time, wherever it is; 0.5s to 1h."""
    warmup_limit: Duration = "10m"
    """How long a rank may compile, restore or start before that counts as hung."""
    digest_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0075
    """About which part of a step's time goes into digests of the training state, by which ranks
    that hold the same are compared: with less, each part of the state is looked at more rarely.
    0: none. Of the embedded trainer, where there are replicas."""
    update_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.002
    """About which part of a step's time goes into updating a part of the weights twice, another
    part in each step: with less, each is more rarely. 0: none. Of the embedded trainer."""
    repair: bool = True
    """Whether a rank whose state differs from what most hold alike is given that before a step uses
    it, where that is right; else, and where it is not, the run goes back and its node leaves."""
    replay_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    """About which part of a step's time goes into computing other ranks' micro-batches once more:
    with less, or if they are seen to take more, it is done more rarely. 0: never; 1: in every step,
    whatever it takes. Of the embedded trainer, on CPUs; on GPUs see replaysOnGpus."""
    replays_on_gpus: bool = False
    """Whether there are replays on GPUs, too, where two processes are not known to come to the same
    bits: if a test in the second step says that they do, and until it shows that they do not. There
    a rank is held to be wrong only once that was seen of it alone, several times."""
    signals: str | None = None
    """A file whose entries take the place of those of the same name in the table that says what
    follows from what hardware says of itself (orchestrator/agent/signals.yaml), code by code where
    they have codes, or are added to it. It is read when the run is started."""
    norm_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.005
    """About which part of a step's time goes into a look of each rank at its own gradient before
    ranks add up: at norms of weights that stand out, and at what all of it adds up to. If it is
    seen to take more, it is done in fewer steps, in one of 8 at least; 1: in every step, whatever
    it takes. The loss and norm of the whole are looked at in every step. Off where replays are."""


class Recovery(_Section, frozen=True, kw_only=True):
    """How often a run may be brought back, by whose fault it was, before it is given up."""

    hardware_budget: NonNegative = 16
    """Restarts for faults of machines and of the network."""
    software_budget: NonNegative = 8
    """Restarts for faults of the program and of numbers, and for what nobody could explain."""
    preemption_budget: NonNegative = 64
    """Restarts because somebody took machines away."""
    refill_every_steps: Positive = 200
    """This many steps of new progress give back one restart to every budget."""
    backoff: Duration = "1s"
    """Pause before a restart if the one before it brought no new step; it doubles each time."""
    backoff_max: Duration = "1m"
    """The longest that this pause gets."""
    spare_wait: Duration = "1m"
    """How long to wait for a node when none is free, or for room for the journal on a full disk,
    before giving up."""
    min_replicas: Positive | None = None
    """With how few of `parallelism.dpReplicate` the run may go on when no node is free in place of
    one that is gone; it grows back when there is one again. The global batch stays what it is.
    Default: half of them if `trainer.reduction` is deterministic, since then the result stays the
    same to the bit; else all, so the run waits, and a user who wants the time more says so."""
    device_ledger: str | None = None
    """Where verdicts about devices are kept for all runs: a folder, file:///folder or
    s3://bucket/prefix; default `@devices` in $HOLDFAST_HOME. A run with a fault plan or of a
    campaign has one of its own, in its folder, whatever is said here: what is broken on purpose
    tells nothing of a device."""
    disable: tuple[str, ...] = ()
    """Policies to do without, to see what they are worth: `planned-swap`, `lemon-retirement`,
    `quarantine-first`, `over-eviction`, `shrink`, `straggler-swap`, `link-swap`, `straggler`,
    `cadence`, `back-off`, `stop-poison`, `hang`, `memory-first`, `expected-loss`."""


class Spec(_Section, frozen=True, kw_only=True):
    """Everything a run is."""

    nodes: Nodes = Nodes()
    parallelism: Parallelism = Parallelism()
    trainer: Trainer = Trainer()
    checkpoint: Checkpoint = Checkpoint()
    detection: Detection = Detection()
    recovery: Recovery = Recovery()
    campaign: bool = False
    """Whether `holdfast campaign` may corrupt this run: what it trains is good for nothing then."""


class Block(NamedTuple):
    """The fewest replicas that fill whole nodes: a world has some of these."""

    replicas: int
    nodes: int


class TrainingRun(_Section, frozen=True, kw_only=True):
    """A run file."""

    api_version: Literal["holdfast.dev/v1alpha1"]
    """Which version of these fields the file is written in."""
    kind: Literal["TrainingRun"]
    """What the file is."""
    metadata: Metadata
    spec: Spec

    @property
    def world_size(self) -> int:
        """Ranks of the world."""
        return self.spec.nodes.count * self.spec.nodes.ranks_per_node

    @property
    def shard_count(self) -> int:
        """How many different shards the state has: replicas share theirs."""
        return self.layout.shard_count

    @property
    def layout(self) -> Layout:
        """How the world is cut; says where a rank stands, and which shard it holds."""
        return self.spec.parallelism.layout(self.world_size)

    @property
    def block(self) -> Block:
        """The unit in which the world shrinks and grows."""
        per_node = self.spec.nodes.ranks_per_node
        replicas = per_node // gcd(per_node, self.shard_count)
        return Block(replicas, replicas * self.shard_count // per_node)

    @property
    def least_replicas(self) -> int:
        """With how few replicas the run goes on (docs/adr/0012)."""
        full = self.spec.parallelism.dp_replicate
        if self.spec.recovery.min_replicas is not None:
            return self.spec.recovery.min_replicas
        return -(-full // 2) if self.same_bits else full

    @property
    def cadence(self) -> Cadence:
        """How often the run saves, at its beginning."""
        every = self.spec.checkpoint
        return Cadence(every.memory_every_steps, every.every_steps)

    @property
    def same_bits(self) -> bool:
        """Whether a step comes out the same with however many replicas, to the last bit."""
        trainer = self.spec.trainer
        return trainer.entrypoint == EMBEDDED and trainer.reduction == "deterministic"

    def speed(self, replicas: int) -> tuple[int, int]:
        """Return the share of the full speed that some of the replicas reach, as a fraction.

        The batch stays what it is, and goes to replicas in rounds of one micro-batch for each of
        their ranks, which nobody can divide: the replica that takes most of them decides. Of a
        trainer that is not the embedded one it is only known how many replicas it has.

        >>> run = TrainingRun(api_version=API_VERSION, kind="TrainingRun",
        ...     metadata=Metadata(name="a"), spec=Spec(nodes=Nodes(count=8),
        ...     parallelism=Parallelism(dp_replicate=8),
        ...     trainer=Trainer(global_batch=128, micro_batch=1)))
        >>> run.speed(7)  # 19 rounds instead of 16
        (16, 19)
        """
        layout, trainer = self.layout, self.spec.trainer
        full = layout.dp_replicate
        one = trainer.reduction == "deterministic"
        micro = trainer.micro_batch or (1 if one else trainer.global_batch // layout.readers)
        rounds, rest = divmod(trainer.global_batch, max(micro * layout.dp_shard, 1))
        if trainer.entrypoint != EMBEDDED or rest or rounds % full:
            return replicas, full
        return rounds // full, -(-rounds // replicas)

    def job(self) -> dict[str, Any]:
        """Return what a rank needs to know of this run, in the run file's own words.

        `parallelism.dpShard` is always written out: a world of fewer replicas is cut as the run
        file says, and its number of ranks alone would not tell how.
        """
        spec: dict[str, Any] = msgspec.to_builtins(self.spec)
        spec["parallelism"]["dpShard"] = self.layout.dp_shard
        return {key: spec[key] for key in _OF_A_RANK}
