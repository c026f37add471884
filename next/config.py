"""The settings of a run: frozen, validated sections that every entry point shares.

A setting has one name everywhere: field, flag (``--optim.lr``), Tune key, TOML recipe, MLflow
parameter and error message. Every change of a setting goes through :func:`override`, which
rebuilds the model and so validates it; a bad run dies before a worker starts.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from next.addresses import redacted, require_no_secret, require_store, tracking_uri

Fraction = float
"""A number in [0, 1]; the field states the bounds."""
MOST_SEED = 2**62
"""Seeds are keys of 64 bits, and sweeps count on from theirs."""
_Side = Annotated[int, Field(ge=1, le=2**13)]
"""Pixels of a side of an image."""
_Camera = Annotated[int, Field(ge=0, le=2**63)]
_Workers = Annotated[int, Field(ge=1, le=2**16)]

LEGACY: dict[str, Any] = {
    "model.backbone.unknown_camera": "all",
    "model.backbone.activation": "as_named",
    "model.backbone.text_activation": "as_named",
    "model.semantic.text_skip": False,
    "selection.draw": "any",
    "evaluation.common_slices": False,
}
"""What versions that did not know a setting behaved like, where that is not its default. A run, a
sweep or a checkpoint whose record lacks the setting goes on so (:func:`from_toml`). The record of
a setting that may be None lacks it where it is None, so None is the only value that such a one may
have here."""

FORMER_DEFAULTS: dict[str, Any] = {"optim.warmup_epochs": 10.0}
"""Defaults of settings that versions before :data:`LEGACY`'s wrote down as if they had been given,
where the default is another now."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown names and out-of-range values.

    TOML has no null, so the text ``"none"`` sets an optional setting to None.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _none_is_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {
            name
            for name, field in cls.model_fields.items()
            if type(None) in get_args(field.annotation)
        }
        return {
            name: None if value == "none" and name in optional else value
            for name, value in values.items()
        }

    @field_validator("*", mode="before")
    @classmethod
    def _holds_no_secret(cls, value: Any) -> Any:
        if isinstance(value, str):
            require_no_secret(value)
        return value


def _known_store(address: str | None) -> str | None:
    if address is not None:
        require_store(address)
    return address


class DataConfig(Section):
    """What is read, and how it is laid out on this node."""

    uri: str | None = None
    """Folder of prepared shards, as ``jobs/prepare.py`` wrote it: a local path or
    ``s3://bucket/prefix`` (see :mod:`next.storage`)."""
    modalities: tuple[str, ...] | None = None
    """Modalities to use, by the card's names; None uses all of them, in the card's order."""
    image_size: tuple[_Side, _Side] | None = None
    """Input height and width in pixels; None takes the card's."""
    cache: str | None = None
    """Folder of decoded caches and text banks of this node; None: ``~/.cache/next-reid``."""
    cache_limit: float | None = Field(default=None, gt=0, le=1e9)
    """Gigabytes (10^9 bytes) that this folder may take; what was not used for longest and is not
    in use is removed to make room. None: no limit."""
    test_resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How query and gallery images of another size are resized; train images always bicubic. The
    public codes resize those of the test bilinearly."""
    placement: Literal["replicated", "sharded"] = "replicated"
    """replicated: every node decodes all of a split; sharded: a worker decodes the shards that an
    epoch deals to it, and draws its identities within them (another plan, for other world sizes
    another one again)."""
    drop_modality: Fraction = Field(default=0.0, ge=0, lt=1)
    """Probability that a modality of a train sample is treated as missing, drawn per (seed, epoch,
    sample); one modality at least stays."""
    mean: float = Field(default=0.5, ge=-1e3, le=1e3)
    """Subtracted from pixel values in [0, 1], for every channel."""
    std: float = Field(default=0.5, gt=0, le=1e3)
    """Divides pixel values after the mean was subtracted."""

    @field_validator("modalities")
    @classmethod
    def _names_differ(cls, modalities: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if modalities is not None and (not modalities or len(set(modalities)) < len(modalities)):
            raise ValueError("must name each modality once, and one at least")
        return modalities

    _is_a_store = field_validator("uri")(_known_store)


class BatchConfig(Section):
    """P x K sampling: identities times instances, over all workers together."""

    identities: int = Field(default=8, ge=2, le=2**20)
    """P: distinct identities of one global batch (two at least, else there is no negative)."""
    instances: int = Field(default=8, ge=2, le=2**20)
    """K: samples of each identity in one global batch (two at least, else no positive)."""

    @property
    def size(self) -> int:
        """Samples of one global batch, P * K."""
        return self.identities * self.instances


class AugmentConfig(Section):
    """Augmentation, drawn per (seed, epoch, sample)."""

    enabled: bool = True
    """Off: the decoded image is only normalised."""
    flip: Fraction = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    pad: int = Field(default=10, ge=0, le=2**13)
    """Zero padding in pixels on each side before the random crop back to the input size."""
    erase: Fraction = Field(default=0.5, ge=0, le=1)
    """Probability of erasing one rectangle of each image."""
    erase_area: tuple[Fraction, Fraction] = (0.02, 0.33)
    """Least and largest share of the image that an erased rectangle covers."""
    shared_geometry: bool = True
    """Flip and crop all modalities of a sample the same way (the public codes draw for each)."""

    @model_validator(mode="after")
    def _area_is_a_range(self) -> AugmentConfig:
        low, high = self.erase_area
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"augment.erase_area must be two shares with 0 < low <= high <= 1, "
                f"but got ({low}, {high})"
            )
        return self


class CaptionsConfig(Section):
    """Which sentences reach which expert."""

    sampling: Literal["all", "subset", "split", "none"] = "subset"
    """all: every expert gets every sentence; subset: each keeps each with probability ``keep``;
    split: the sentences are dealt out over the experts; none: no text."""
    keep: float = Field(default=0.7, gt=0, le=1)
    """Probability that an expert keeps a sentence (``sampling = subset``); at least one is kept."""
    encode: Literal["sentences", "joint"] = "sentences"
    """sentences: mean of unit sentence embeddings; joint: the sampled sentences as one text."""
    evaluation: Literal["all", "split", "none"] = "all"
    """The deterministic choice at evaluation (``none`` if ``sampling`` is none)."""
    unreliable: bool = False
    """Sample sentences that hold none, unknown, unclear or unknowable, too."""


class BackboneConfig(Section):
    """The visual tower, and the text tower that reads the captions."""

    name: str = "ViT-B-16"
    """An open_clip model, a timm ViT (``vit_base_patch16_dinov3.lvd1689m``; its tag may stand in
    the name), or ``next-tiny`` (the project's own small CLIP)."""
    pretrained: str | None = "openai"
    """A tag of the model or a weights file; None: random weights from ``seed``."""
    file: str | None = None
    """File that ``pretrained`` stands for; found or fetched by the driver, never by a worker."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 that the file must have; None: taken from the file by the driver."""
    text_name: str | None = None
    """open_clip model whose text tower reads captions; None: the backbone's own, or ViT-B-16's
    beside a timm ViT."""
    text_pretrained: str | None = "openai"
    """A tag or a weights file of ``text_name``; without a text model of its own, ``pretrained``."""
    text_file: str | None = None
    """As ``file``, for the text tower."""
    text_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """As ``sha256``, for the text tower."""
    activation: Literal["auto", "gelu", "quick_gelu", "as_named"] = "auto"
    """What a block of an open_clip model computes between its linear layers, which must be what its
    weights were trained with. auto: the driver learns it from the tag or the file and writes down
    which it is; as_named: QuickGELU for tags and names that say so, GELU for any file (up to
    version 0.1)."""
    text_activation: Literal["auto", "gelu", "quick_gelu", "as_named"] = "auto"
    """As ``activation``, for the text tower of ``text_name``."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of random weights (both towers); used only without ``pretrained``."""
    camera_coefficient: float | None = Field(default=None, gt=0, le=1e3)
    """Weight of the learned camera embedding (SIE) added to the class token; None: off."""
    unknown_camera: Literal["trained", "all"] = "trained"
    """What an unknown camera gets, the mean embedding of the cameras that train samples come from;
    all: of all numbers up to the highest, which may hold some that do not exist (up to version
    0.1)."""
    checkpointing: bool = False
    """Keep only the input of each block of the tower and compute the rest again in the backward
    pass: much less memory for about a third more time, with the same result."""
    compile: bool = False
    """Compile the blocks of the tower with ``torch.compile`` (training only). Worth it on a GPU: a
    step of 64 samples in bfloat16 took 14 % less on an H200 with ``optim.cuda_graph``, 12 to 17 %
    without."""


class SemanticConfig(Section):
    """TMSE, the text-modulated semantic experts."""

    enabled: bool = True
    """Off: the branch is left out (ablation)."""
    experts: int = Field(default=4, ge=1, le=2**10)
    """Number of experts E; each gives one token."""
    tokens_per_expert: int | None = Field(default=None, ge=1, le=2**20)
    """Patches that an expert samples in each modality (the largest weights); None: all."""
    expansion: float = Field(default=2.0, gt=0, le=1e12)
    """Hidden width of an expert's MLP, in units of the token width."""
    mixer_hidden: int = Field(default=8, ge=1, le=2**16)
    """Hidden width of the mix of text scores along the modality axis."""
    text_skip: bool = True
    """A learned scale of the text scores, and the scores themselves beside their mix; off: the mix
    of raw cosines alone, which is too small for captions to matter (up to version 0.1)."""


class StructureConfig(Section):
    """CSSE, the context-shared structure experts."""

    enabled: bool = True
    """Off: the branch is left out (ablation)."""
    experts: int = Field(default=4, ge=1, le=2**10)
    """Number of experts E."""
    slots: int = Field(default=2, ge=1, le=2**10)
    """Slots S of each expert; the branch gives E * S tokens."""
    expansion: float = Field(default=2.0, gt=0, le=1e12)
    """Hidden width of an expert's MLP, in units of the token width."""


class RoutingConfig(Section):
    """What both kinds of experts share."""

    temperature: float = Field(default=1.0, gt=0, le=1e21)
    """Divides the scores before the routing softmax; small: sharp, large: even."""
    init: Literal["normal", "orthogonal"] = "normal"
    """orthogonal: the routers start so that different experts look along orthogonal directions of
    the token space."""


class AggregationConfig(Section):
    """MGFA, the cross-attention of class tokens over expert tokens."""

    heads: int = Field(default=4, ge=1, le=2**10)
    """Attention heads; must divide the token width."""
    expansion: float = Field(default=2.0, gt=0, le=1e12)
    """Hidden width of the MLP, in units of the token width."""


class ModelConfig(Section):
    """The network. Fields that are None are taken from the data by ``resolve``."""

    backbone: BackboneConfig = BackboneConfig()
    """The towers."""
    semantic: SemanticConfig = SemanticConfig()
    """Text-modulated semantic experts."""
    structure: StructureConfig = StructureConfig()
    """Context-shared structure experts."""
    routing: RoutingConfig = RoutingConfig()
    """Routing softmax."""
    aggregation: AggregationConfig = AggregationConfig()
    """Multi-grained features aggregation."""
    supervise_cls: bool = False
    """A third branch that supervises the plain class tokens."""
    modalities: int | None = Field(default=None, ge=1, le=2**10)
    """Number of modalities M; None: from the data."""
    image_size: tuple[_Side, _Side] | None = None
    """Input height and width in pixels; None: from the data."""
    identities: int | None = Field(default=None, ge=1, le=2**40)
    """Classes of the identity heads; None: from the data."""
    cameras: int | None = Field(default=None, ge=1, le=2**63)
    """Known cameras for the camera embedding; None: from the data."""
    trained_cameras: tuple[_Camera, ...] | None = None
    """Those that the train split has samples of; an unknown camera gets their mean embedding. None:
    from the data."""


class LossConfig(Section):
    """Sum over branches of identity and triplet loss."""

    identity_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the cross-entropy over train identities."""
    triplet_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the batch-hard triplet loss with soft margin."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the cross-entropy."""
    diversity_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the overlap of a branch's experts (``train/overlap_<branch>``), so that they look
    at different patches; 0: off."""


class OptimConfig(Section):
    """Optimizer and schedule."""

    name: Literal["adam", "adamw"] = "adam"
    """adam: weight decay joins the gradient (as the field does); adamw: decoupled."""
    lr: float = Field(default=3.5e-4, gt=0, le=1e21)
    """Peak learning rate of everything but the visual tower."""
    tower_lr: float = Field(default=5e-6, gt=0, le=1e21)
    """Peak learning rate of the visual tower."""
    weight_decay: float = Field(default=1e-4, ge=0, le=1e3)
    """Weight decay of what ``decay`` says."""
    decay: Literal["matrices", "all"] = "matrices"
    """matrices: no norms, biases and embeddings are decayed; all: every tensor, as the public codes
    do."""
    bias_lr_factor: float = Field(default=1.0, gt=0, le=1e6)
    """Multiplies the learning rate of the biases outside of the visual tower."""
    epochs: int = Field(default=50, ge=1, le=10**6)
    """Epochs to train; with pruning, the most a trial gets."""
    schedule: Literal["cosine", "peers"] = "cosine"
    """cosine: every group rises from zero to its own peak, then falls along half a cosine; peers:
    as the public codes do it, which warm all groups up from 0.1 x ``schedule_lr``, the tower
    too."""
    warmup_epochs: float | None = Field(default=None, ge=0, le=1e6)
    """Linear warm-up, in epochs; None: a fifth of ``epochs``, at most 10."""
    final_lr_share: float = Field(default=0.01, ge=0, le=1)
    """Learning rate at the end, as a share of the group's peak (peers: of ``schedule_lr``)."""
    schedule_lr: float | None = Field(default=None, gt=0, le=1e21)
    """peers: the rate whose shares the schedule begins and ends with; None: ``lr``."""
    lr_noise: bool = False
    """peers: multiply the learning rates of an epoch by a random number of 0.33 to 1.67, as the
    public codes do; it is drawn from the epoch's number alone."""
    clip_norm: float | None = Field(default=None, gt=0, le=1e9)
    """Largest norm of the whole gradient; None: not clipped."""
    collapse_steps: int | None = Field(default=200, ge=1, le=10**12)
    """End the run when one of several experts gets 99 % of its branch's attention for so many
    steps in a row; None: go on."""
    accumulate: int = Field(default=1, ge=1, le=2**20)
    """Parts in which a worker's share of the batch goes through the network. The loss is still of
    the whole batch, so the result is the same; memory is that of one part, and every part is
    computed twice."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of an exponential average of the weights, which is evaluated and kept in place
    of the trained weights; None: no average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the forward pass; losses and distances are always float32."""
    cuda_graph: bool = False
    """On one GPU, record forward and backward of a batch once and replay them: otherwise the host
    starts some fifteen hundred kernels a step, which limits small batches and small towers. In
    bfloat16 on an H200 a step of 64 samples took 7 % less, one of 16 less than half. The graph
    keeps its activations' memory during evaluation too."""

    @model_validator(mode="after")
    def _noise_belongs_to_the_peers(self) -> OptimConfig:
        if self.schedule != "peers" and (self.lr_noise or self.schedule_lr is not None):
            name = "optim.lr_noise" if self.lr_noise else "optim.schedule_lr"
            raise ValueError(
                f"{name} belongs to optim.schedule = peers, but got {self.schedule}; leave it out, "
                f"or set the schedule"
            )
        return self

    @property
    def warmup(self) -> float:
        """Epochs of the warm-up, also where ``warmup_epochs`` is left to ``epochs``."""
        return min(10.0, 0.2 * self.epochs) if self.warmup_epochs is None else self.warmup_epochs

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimConfig:
        if self.warmup > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs must not exceed optim.epochs, but got {self.warmup_epochs} > "
                f"{self.epochs}; lower it, or set it to none, which is a fifth of the epochs"
            )
        return self


Metric = Literal[
    "val/mAP",
    "val/mINP",
    "val/rank1",
    "val/rank5",
    "val/rank10",
    "train/loss",
    "train/seconds_per_step",
]
"""What is reported after each evaluation, and can choose."""
METRIC: Metric = "val/mAP"
"""What chooses where nobody says what; what queries are resampled for."""
SCORES: dict[str, str] = {METRIC: "mAP", "val/rank1": "Rank-1"}
"""What tables, curves and the log show whatever chooses, and its short names."""


class SelectionConfig(Section):
    """How the best epoch and the best trial are chosen."""

    metric: Metric = METRIC
    """Decides which epoch is the best one, whose checkpoint is kept and assessed. In a sweep it is
    the first of its space's OBJECTIVES."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether the largest or the smallest value is best; auto: the largest of ``val/``, the
    smallest of ``train/``."""
    split: Literal["val", "test"] = "val"
    """val: held-out train identities; test: as the public codes do, which flatters the result."""
    draw: Literal["evaluable", "any"] = "evaluable"
    """evaluable: held out are identities that can be queries under the card's rule, and
    distractors; any: whichever are drawn, measurable or not (as earlier versions did)."""
    holdout: float = Field(default=0.15, ge=0, lt=1)
    """Share of train identities held out for ``val`` as queries; at most half of those that can be
    queries where these are not all. Not read with several folds."""
    distractors: Fraction = Field(default=0.1, ge=0, lt=1)
    """Share of the train identities that cannot be queries, which are held out beside them to be
    searched only."""
    folds: int = Field(default=1, ge=1, le=10**6)
    """k > 1: cross-validation. Every identity that can be a query is held out in one of k folds;
    in a sweep each next seed of a setting takes the next fold."""
    fold: int = Field(default=0, ge=0, le=10**6)
    """The fold that this run holds out, from 0; in a sweep that of the search."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the choice of held-out identities; the same for every trial of a sweep."""
    every: int = Field(default=1, ge=1, le=10**6)
    """Evaluate each so many epochs (and after the last)."""
    batch: int = Field(default=128, ge=1, le=2**20)
    """Samples of one evaluation forward."""

    def rank(self, value: float) -> float:
        """A value of ``metric`` such that larger is better.

        Example:
            >>> SelectionConfig(metric="train/loss").rank(2.0)
            -2.0
        """
        largest = self.metric.startswith("val/") if self.mode == "auto" else self.mode == "max"
        return value if largest else -value

    @model_validator(mode="after")
    def _val_needs_identities(self) -> SelectionConfig:
        if self.split == "val" and self.holdout == 0:
            raise ValueError(
                "selection.holdout must be positive with selection.split = val, but got 0; "
                "hold out a share of train identities, or set selection.split = test"
            )
        if self.fold >= self.folds:
            raise ValueError(
                f"selection.fold must be below selection.folds = {self.folds}, but got "
                f"{self.fold}; folds are counted from 0"
            )
        if self.split == "test" and self.folds > 1:
            raise ValueError(
                f"selection.folds divides the train identities for selection.split = val, but got "
                f"{self.folds} with selection.split = test; leave it out"
            )
        return self


class EvaluationConfig(Section):
    """How features are compared wherever queries search a gallery."""

    common_slices: bool = True
    """Compare samples that have other modalities than one another over the slices of the feature
    that both have, renormalised. Off: over the whole feature, as the literature does, where a slice
    that only one side has pushes a match away (RGB against all modalities: 4.8 mAP, not 19.5)."""


class ScalingConfig(Section):
    """Named after ``ray.train.ScalingConfig``."""

    num_workers: _Workers | tuple[_Workers, _Workers] = 1
    """1: train in this process (or in a trial's); more, or a cluster (``RAY_ADDRESS``): through Ray
    Train. Two numbers, least and most: as many as the cluster holds, fewer when a node is lost,
    more when one joins."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: float = Field(default=1.0, gt=0, le=1e6)
    """CPUs that Ray reserves for each worker; may be a fraction."""
    elastic_resize_monitor_interval_s: float = Field(default=60.0, ge=0, le=1e9)
    """With two numbers of workers: seconds between looks at whether there is room for more."""

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> ScalingConfig:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"scaling.num_workers must be one number, or the least and the most with "
                f"1 <= least <= most, but got {self.num_workers}"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Without so many the run waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """More are never used."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class CheckpointConfig(Section):
    """Named after ``ray.train.CheckpointConfig``."""

    storage_path: str | None = None
    """Folder of the checkpoints of all runs, ``s3://bucket/prefix`` or local, that all nodes see;
    None: within the run's own folder."""
    num_to_keep: int = Field(default=1, ge=1, le=10**9)
    """Best checkpoints kept, beside the two latest."""
    every_steps: int | None = Field(default=None, ge=1, le=10**12)
    """Write one within an epoch, too, each so many optimizer steps; None: at evaluations only."""
    patience_s: float = Field(default=600, ge=0, le=1e9)
    """Seconds for which one that cannot be written (disk full, storage away) is tried again."""

    _is_a_store = field_validator("storage_path")(_known_store)


class RunSection(Section):
    """Named after ``ray.train.RunConfig``: where a run lives."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder; the same name resumes the run. None: a new name from the time."""
    storage_path: str = "runs"
    """Folder of all runs, on the machine of the driver; for checkpoints in an object store set
    ``checkpoint.storage_path``."""
    max_failures: int = Field(default=3, ge=-1, le=10**9)
    """How often workers of Ray Train that died are started again from the last checkpoint; -1:
    always. The loss of a node that was announced does not count."""
    fresh: bool = False
    """Start from nothing although a run of this name exists; its folder is set aside and kept."""

    @model_validator(mode="after")
    def _journal_needs_a_disk(self) -> RunSection:
        if "://" in self.storage_path:
            raise ValueError(
                f"run.storage_path must be a local folder, which the journal is appended to, but "
                f"got {redacted(self.storage_path)}; set checkpoint.storage_path to that instead"
            )
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """``http(s)://`` address; None: SQLite under the storage path and a local server."""
    experiment: str | None = None
    """Experiment; None: the benchmark's name."""
    enabled: bool = True
    """Off: the journal beside the run is still written."""
    model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+$")
    """Registered model of which the best checkpoint becomes a version, with the alias
    ``candidate``; None: it is not registered (``jobs/promote.py`` can do it later)."""
    git_diff: bool = False
    """Send what the checkout has beyond its commit (``git diff HEAD``) to the server, too. Off: it
    stays in the run's folder, as ``artifacts/git/diff.txt``."""
    system_seconds: float | None = Field(default=10.0, ge=0.1, le=1e9)
    """Seconds between samples of CPU, memory and GPUs (``system/*``); None: none are taken."""
    every_steps: int = Field(default=20, ge=1, le=10**12)
    """Read the losses of so many optimizer steps from the device at once, log them, and end the run
    if one is not finite. Fewer: seen sooner, and a GPU is waited for more often."""

    @model_validator(mode="after")
    def _is_a_server(self) -> TrackingConfig:
        if self.enabled and self.uri is not None:
            tracking_uri(self.uri)
        return self


class RunConfig(Section):
    """Everything that decides a run."""

    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of initialisation, batch order, augmentation and caption sampling."""
    threads: int | None = Field(default=None, ge=1, le=2**16)
    """Torch threads of a worker; None: as torch chooses."""
    keep_memory: bool = False
    """On a CPU, keep the memory that a step frees for the next one: a full-size step in float32 is
    about a tenth faster, and the process holds its peak."""
    data: DataConfig = DataConfig()
    """Input."""
    batch: BatchConfig = BatchConfig()
    """P x K batches."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation."""
    captions: CaptionsConfig = CaptionsConfig()
    """Caption sampling."""
    model: ModelConfig = ModelConfig()
    """Network."""
    loss: LossConfig = LossConfig()
    """Loss."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    selection: SelectionConfig = SelectionConfig()
    """Choice of the best epoch."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Comparison of features."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    run: RunSection = RunSection()
    """Where the run lives."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> RunConfig:
        sizes = range(self.scaling.min_workers, self.scaling.max_workers + 1)
        uneven = [str(size) for size in sizes if self.batch.size % size]
        if uneven:
            raise ValueError(
                f"batch.identities * batch.instances must be a multiple of scaling.num_workers (of "
                f"every number from the least to the most), so that every worker gets the same "
                f"share, but got {self.batch.size} over {', '.join(uneven)}; "
                f"{math.lcm(*sizes)} and its multiples would do"
            )
        share = self.batch.size // self.scaling.max_workers
        if self.optim.accumulate > share:
            raise ValueError(
                f"optim.accumulate must not exceed the {share} samples of a worker's share of the "
                f"batch, but got {self.optim.accumulate}; lower it"
            )
        if self.optim.cuda_graph and not (self.scaling.use_gpu and self.scaling.max_workers == 1):
            raise ValueError(
                f"optim.cuda_graph needs scaling.use_gpu = true and scaling.num_workers = 1, but "
                f"got {self.scaling.use_gpu} and {self.scaling.num_workers}; leave it off"
            )
        if self.data.placement == "sharded" and not isinstance(self.scaling.num_workers, int):
            raise ValueError(
                f"scaling.num_workers must be one number with data.placement = sharded, which "
                f"deals the shards to so many workers, but got {self.scaling.num_workers}"
            )
        if self.data.placement == "sharded" and self.batch.identities % self.scaling.max_workers:
            raise ValueError(
                f"batch.identities must be a multiple of scaling.num_workers with data.placement "
                f"= sharded, because each worker draws its own identities, but got "
                f"{self.batch.identities} over {self.scaling.num_workers}"
            )
        return self


def override(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A new configuration with dotted ``settings`` replaced, validated as a whole.

    Example:
        >>> override(RunConfig(), {"optim.lr": 1e-3}).optim.lr
        0.001

    Raises:
        ValueError: a name that does not exist (with the near match), a value out of range or of
            the wrong type, or values that do not fit each other; all problems are listed.
    """
    known = set(setting_names())
    tree = config.model_dump()
    problems = []
    for name, value in settings.items():
        if name not in known:
            problems.append(_unknown_setting(name, sorted(known)))
            continue
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError(describe(error)) from None


def setting_names() -> list[str]:
    """All dotted names of :class:`RunConfig`, in the order in which they are declared."""
    return [name for name, _ in flatten(RunConfig())]


def flatten(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and value, depth first."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(ours: RunConfig, theirs: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with both values.

    A warm-up that is left to the number of epochs equals the same one that was given.
    """
    other = dict(flatten(theirs))
    found = {name: (value, other[name]) for name, value in flatten(ours) if value != other[name]}
    if ours.optim.warmup == theirs.optim.warmup:
        found.pop("optim.warmup_epochs", None)
    return found


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Dotted settings of a TOML file, whose tables are the sections.

    Raises:
        ValueError: the file is not TOML, or holds an unknown setting (with the near match).
        FileNotFoundError: there is no such file.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    settings = dotted(tree)
    known = setting_names()
    problems = [_unknown_setting(name, known) for name in settings if name not in known]
    if problems:
        raise ValueError(f"{path}: " + "\n".join(problems))
    return settings


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted names: ``{"optim": {"lr": 1}} -> {"optim.lr": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_toml(config: RunConfig, *, without: Iterable[str] = ()) -> str:
    """The configuration as TOML that :func:`from_toml` reads back; None is left out.

    Args:
        config: what is written.
        without: dotted names of settings that are left out.
    """
    tree = config.model_dump(mode="json", exclude_none=True)
    for name in without:
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node.pop(leaf, None)
    return tomli_w.dumps(tree)


def from_toml(text: str) -> RunConfig:
    """Read what :func:`to_toml` wrote.

    A default that is not None but was None in the written configuration is set back to None, so
    that reading is the exact inverse of writing. A setting that cannot be None and is absent did
    not exist when the file was written (an older run or checkpoint), and gets the value that says
    what that version did: that of :data:`LEGACY`, else its default.

    Raises:
        ValueError: unknown settings or bad values.
    """
    settings = dotted(tomllib.loads(text))
    absent = {
        name: None
        for name, value in flatten(RunConfig())
        if value is not None and name not in settings and _may_be_none(name)
    }
    return override(RunConfig(), LEGACY | absent | settings)


def read_written(path: Path) -> str:
    """The text of a file that :func:`to_toml` or a like writer wrote, for :func:`from_toml`.

    Raises:
        ValueError: it is no TOML, which it was when it was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(
            f"{path} is damaged ({error}); bring it back from a copy (the checkpoints of a run or "
            f"a trial hold its config.toml, too)"
        ) from None
    return text


def predated(text: str) -> dict[str, Any]:
    """The settings of :data:`LEGACY` that a written configuration lacks, with what it means."""
    written = dotted(tomllib.loads(text))
    return {name: value for name, value in LEGACY.items() if name not in written}


def _may_be_none(name: str) -> bool:
    section: Section = RunConfig()
    *sections, leaf = name.split(".")
    for part in sections:
        section = getattr(section, part)
    return type(None) in get_args(type(section).model_fields[leaf].annotation)


def describe(error: ValidationError) -> str:
    """One line for each problem: setting, rule, what came."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        came = problem["input"]
        if where and not isinstance(came, Mapping):
            # An address may hold a secret; who refused it for that has said what came.
            told = "" if "but got" in message else f", but got {redacted(repr(came))}"
            message = f"{where}: {message}{told}"
        lines.append(message)
    return "\n".join(lines)


def near_matches(name: str, known: list[str]) -> list[str]:
    """Up to three names of ``known`` that ``name`` may have meant; leaf names count too."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {other.rsplit(".", 1)[-1] for other in known}
        near = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.75)
        close = [other for other in known if near and other.rsplit(".", 1)[-1] == near[0]][:3]
    return close


def _unknown_setting(name: str, known: list[str]) -> str:
    sections = {known_name.rsplit(".", 1)[0] for known_name in known if "." in known_name}
    if name in sections:
        inside = ", ".join(other for other in known if other.startswith(name + "."))
        return f"{name} is a section, not a setting; set one of: {inside}"
    close = near_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; see --help for all settings"
    return f"there is no setting named {name!r}{hint}"
