"""What the JSON files of a run must hold; pydantic checks them before anything uses a value.

Unknown keys are kept, so that files of later versions can be read; a key that is not required may
be missing, as in files of earlier versions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from ultrazoo.train.schedule import Progress

keep_unknown = with_config(ConfigDict(extra="allow"))
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Word = Annotated[int, Field(ge=0, lt=2**32)]
Revisions = dict[str, Annotated[int, Field(ge=1, le=2**31 - 1)]]
ProgressFields = TypedDict("ProgressFields", get_type_hints(Progress), total=False)  # type: ignore[misc]
with_config(ConfigDict(extra="forbid"))(ProgressFields)


@keep_unknown
class Random(TypedDict, total=False):
    """Random number generators: Python's, NumPy's (both Mersenne Twisters), torch's by device in base64."""

    python: tuple[int, Annotated[list[Word], Field(min_length=625, max_length=625)], float | None]
    numpy: tuple[str, Annotated[list[Word], Field(min_length=624, max_length=624)], int, int, float]
    torch: str
    cuda: str
    mps: str


@keep_unknown
class Records(TypedDict):
    """The lines of metrics.jsonl that were written before a checkpoint."""

    count: Count
    last: str | None


@keep_unknown
class Losses(TypedDict):
    """Recent losses."""

    history: list[float]
    spiking: bool


@keep_unknown
class Routers(TypedDict):
    """Recent loads of the experts: statistic -> record -> layer -> expert."""

    loads: dict[str, list[list[list[float]]]]
    told: list[str]


@keep_unknown
class Watched(TypedDict):
    """Losses and routers that are watched for anomalies."""

    loss: Losses
    router: Routers


@keep_unknown
class Position(TypedDict, total=False):
    """Position in the data; ``DataModule`` checks that it is complete."""

    format: int
    epoch: Count
    window: Count
    row: Count
    window_rows: Annotated[int, Field(ge=1, le=2**63 - 1)]
    plan: dict[str, Any]
    fingerprint: str
    hashing: Annotated[int, Field(ge=1)]
    discovery: Annotated[int, Field(ge=1)]
    tokenizer_sha256: str
    seen: dict[str, int]
    skipped: dict[str, int]
    damage: dict[str, str]
    damaged_files: dict[str, str]


@keep_unknown
class State(TypedDict, total=False):
    """state.json of a checkpoint."""

    run: str
    revisions: Revisions
    step: Count
    epoch: float
    validation_loss: float | None
    progress: ProgressFields
    window: list[dict[str, float | None]]
    records: Records
    watch: Watched
    finite: dict[str, int]
    data: Position
    tokenizer_sha256: str
    data_fingerprint: str
    rng: Random
    rng_others: list[Random]
    processes: Annotated[int, Field(ge=1, le=2**31 - 1)]
    scaler: dict[str, Any]
    ultrazoo: str
    torch: str
    device: str
    num_threads: Annotated[int, Field(ge=1, le=2**31 - 1)]


@keep_unknown
class NeededPlugin(TypedDict):
    """A plugin that a model is made of."""

    distribution: str
    version: str
    blocks: list[str]


@keep_unknown
class Kernel(TypedDict):
    """What an op ran on."""

    op: str
    compiled: bool
    detail: str


@keep_unknown
class Rows(TypedDict, total=False):
    """The training data of a checkpoint."""

    fingerprint: str
    files: int
    rows: int
    skipped: dict[str, int]
    damage: dict[str, str]
    damaged_files: dict[str, str]


@keep_unknown
class Receipt(TypedDict, total=False):
    """receipt.json of a checkpoint."""

    written: str
    step: int
    epoch: float
    tokens: int
    train_loss: float | None
    validation: dict[str, float]
    num_threads: int
    command: list[str]
    packages: dict[str, str]
    plugins: list[NeededPlugin] | dict[str, str]
    kernel_policy: str
    kernels: list[Kernel]
    data: Rows
    tokenizer_sha256: str


@keep_unknown
class Goal(TypedDict, total=False):
    """The training fields by which a start ends its part of a run."""

    max_steps: Annotated[int, Field(ge=1)] | None
    num_epochs: Annotated[float, Field(gt=0)]
    log_every_n_steps: Annotated[int, Field(ge=1)]


@keep_unknown
class Start(TypedDict):
    """One start or resume of a run."""

    step: Count
    ultrazoo: NotRequired[str]
    torch: NotRequired[str]
    device: NotRequired[str]
    num_threads: NotRequired[int]
    resumed_from: NotRequired[str | None]
    weights_from: NotRequired[str | None]
    changed: NotRequired[list[str]]
    plan: NotRequired[Goal]
    processes: NotRequired[int]
    run_dir: NotRequired[str]
    files: NotRequired[dict[str, str]]


@keep_unknown
class Starts(TypedDict):
    """env.json of a run."""

    starts: list[Start]


@keep_unknown
class Machine(TypedDict):
    """Device and threads of a step."""

    device: str
    num_threads: Annotated[int, Field(ge=1, le=2**31 - 1)]


@keep_unknown
class StepRecord(TypedDict):
    """record.json of a flight record."""

    step: Count
    loss: str
    gradient_norm: str
    num_tokens: list[Count]
    dtype: str
    loss_scale: float
    random: Random
    revisions: NotRequired[Revisions]
    kernel_policy: Literal["auto", "compiled", "reference"]
    kernels: list[Kernel]
    environment: Machine


@keep_unknown
class Manifest(TypedDict):
    """manifest.json of a published folder; ``verify_folder`` checks the rest."""

    files: NotRequired[dict[str, Any]]
