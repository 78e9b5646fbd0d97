"""What the probes of this suite answer, key by key: written by a probe, read by its judges and by the report.

As the store gives it, each answer also has what the probe runner adds: ``key``, ``machine``, ``started_at`` and others.
Digests are hex SHA-256. Nats are per predicted token, standard errors over documents: ``None`` with one document.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class MergeAnswer(TypedDict):
    """The merged weights beside base + scale B A, computed in float64."""

    run: dict[str, Any]  # adapter_sha256
    scale: float  # by the config: alpha / rank, or alpha / sqrt(rank)
    adapter_states_scale: float  # by the adapter's own adapter_config.json
    differing_files: list[str]  # configuration and tokenizer files that are not the base's bytes
    num_adapter_pairs: int
    num_changed_tensors: int  # with an adapter
    num_same_tensors: int  # without one
    differing_tensors: list[str]  # without an adapter, and not the base's bytes
    missing_tensors: list[str]  # on one side only
    fitted_scale: float | None  # by least squares over all changed numbers; `None` where the adapter is zero
    worst: dict[str, Any]  # tensor, and its largest error / what rounding allows there: error_in_tolerances
    rounding_share_of_change: float | None  # norm of the rounding errors / norm of the change


class StringsAnswer(TypedDict):
    """All strings, in one way of reading them."""

    by_kind: dict[str, dict[str, int]]  # num_strings, num_equal, known exceptions: num_not_nfc, num_end_of_turn
    num_differing: int  # without being a known exception
    differences: list[dict[str, Any]]  # the first 20: kind, text in ASCII, ids of the tokenizer (wanted) and llama.cpp


class Conversation(TypedDict):
    """A conversation up to the answer, by the GGUF file's template or the Modelfile's, and by the tokenizer's."""

    name: str
    text_is_equal: bool
    ids_are_equal: NotRequired[bool]  # not for a Modelfile


class SpecialsAnswer(TypedDict):
    """The special tokens. Their ids are those of bos, eos and padding; ``None``: there is none."""

    tokenizer: dict[str, int | None]
    written: dict[str, int | None]  # in the GGUF file
    used: dict[str, int | None]  # by llama.cpp
    tokenizer_adds_bos: bool  # in front of a text
    llama_cpp_adds_bos: bool
    tokenizer_adds_eos: bool  # behind a text
    llama_cpp_adds_eos: bool
    ends_of_turn: list[str]  # texts at which llama.cpp stops
    eos_ends_a_turn: bool  # the tokenizer's EOS is one of them
    ordinary_text_that_ends_a_turn: list[str]  # those that are no control tokens of the tokenizer


class ModelfileAnswer(TypedDict):
    """The Modelfile, parsed."""

    model: str  # after FROM
    model_exists: bool
    has_template: bool
    stops: list[str]
    stops_at_eos: bool  # at the tokenizer's EOS
    conversations: list[Conversation]  # none without a template


class TokensAnswer(TypedDict):
    """A GGUF file's vocabulary and templates beside the tokenizer."""

    run: dict[str, Any]  # adapter_sha256, tokenizer_sha256
    file: dict[str, Any]  # name, pre_tokenizer
    strings: dict[str, StringsAnswer]  # by how control tokens are read: "control tokens named", "plain text"
    template_is_equal: bool  # the file's chat template is the tokenizer's, as text
    conversations: list[Conversation]
    specials: SpecialsAnswer
    modelfile: ModelfileAnswer | None  # `None`: there is none


class Link(TypedDict):
    """One digest that a record states, beside that of the artefact."""

    artefact: str
    stated_in: str  # file name of the record
    stated: str | None  # `None`: no record names it
    found: str | None  # `None`: the artefact is missing
    holds: bool


class ProvenanceAnswer(TypedDict):
    """All links from corpus to Modelfile."""

    run: dict[str, Any]  # adapter_sha256
    links: list[Link]
    llama_cpp_commit: str | None


class Pair(TypedDict):
    """Predictions of two models."""

    reference: str
    subject: str
    mean_kl_nats: float  # KL(reference || subject)
    standard_error_nats: float | None
    largest_kl_nats: float  # of one prediction
    same_top_share: float  # of predictions whose most probable token is the same


class Step(TypedDict):
    """A model's held-out loss and its paired change from the model before it; ``None`` for the first."""

    subject: str
    nats_per_token: float
    change_nats_per_token: float | None
    standard_error_nats_per_token: float | None


class GreedyText(TypedDict):
    """The greedy continuation of one prompt by the merged weights and by a GGUF file."""

    merged: str
    found: str  # the file's
    is_equal: bool  # token by token
    num_tokens: int  # of the merged weights' text
    parts_at: int | None  # the first token that differs
    lead_nats: float | None  # the merged weights' logit there, over their second choice's
    smallest_lead_nats: float | None  # of any token


class DivergenceAnswer(TypedDict):
    """What an export loses. A model is "base", "adapter", "merged", a GGUF file's type, or a control of the probe."""

    run: dict[str, Any]  # adapter_sha256, merged_sha256
    base: dict[str, Any]  # sha256, shape, dtype
    held_out: dict[str, Any]  # num_documents, num_tokens (predicted), examples_sha256, most_tokens_a_document
    files: dict[str, dict[str, Any]]  # by type: forge.training.export.gguf.GgufReport
    pairs: list[Pair]
    chain: list[Step]  # base, adapter, merged, then the files
    # On the 4-bit base that was trained on, and to the original one: nats_per_token, shift_nats_per_token, its
    # standard_error_nats_per_token; only `why` where that could not be measured; `None`: the base was not in 4 bits.
    four_bit: dict[str, Any] | None
    greedy: dict[str, Any]  # subject: the file's type; num_tokens, at most, per answer; answers: list[GreedyText]
    documents: list[dict[str, Any]]  # document, num_tokens, sums by model or pair
