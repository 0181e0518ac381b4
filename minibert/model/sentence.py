"""An encoder of sentences: BERT, the tokens of each text pooled into one vector, normalised or not.

Reimers and Gurevych, "Sentence-BERT" (2019). The folder is sentence-transformers'; texts and their tokenizer are in
`minibert.tasks.sentences`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minibert.errors import UserError, warn
from minibert.kernels.embedding import gather_rows, scatter_rows
from minibert.kernels.pooling import mean_pool, normalize
from minibert.model import checkpoint
from minibert.model.bert import BertModel, WithEncoder
from minibert.model.config import BertConfig
from minibert.model.pretrained import refuse_far_larger
from minibert.model.sentence_config import SentenceConfig, read_sentence_folder, write_sentence_folder
from minibert.model.tensor import Tensor, apply


class SentenceBert(WithEncoder):
    """BertModel as `bert`, and how its output is pooled as `sentence_config`."""

    def __init__(
        self, config: BertConfig, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, sentence_config: SentenceConfig | None = None, add_pooling_layer: bool = False, initialise: bool = True,
    ) -> None:  # fmt: skip
        """`add_pooling_layer`: BERT's own pooler, which is not used here, kept for those who read the folder."""
        place = self.begin(config, backend, dtype, seed)
        self.sentence_config = sentence_config or SentenceConfig()
        self.bert = BertModel(config, place.backend, dtype, seed, add_pooling_layer=add_pooling_layer, initialise=False)
        if initialise:
            self.initialise()

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text at most, [CLS] and [SEP] among them: what is longer is cut."""
        positions = self.config.max_position_embeddings
        return min(self.sentence_config.max_seq_length or positions, positions)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
        *, cu_seqlens: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """(B, C): a vector for each sequence of a batch as `BertModel` takes it; of one without tokens, zeros."""
        encoded = self.bert.encode(
            input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens=cu_seqlens, **options
        )
        batch, x = encoded._batch, encoded._layers[-1]
        y = apply(mean_pool, x, batch.cu_seqlens) if self.sentence_config.pooling == "mean" else _first_rows(batch, x)
        return apply(normalize, y) if self.sentence_config.normalize else y

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: Any = "numba", dtype: str = "float32", seed: int = 0,
        *, pooling: str | None = None, normalize: bool | None = None, **unknown: Any,
    ) -> SentenceBert:  # fmt: skip
        """Load a folder of sentence-transformers, or any BERT's, with dropout off.

        `pooling` ("mean", "cls") and `normalize` count before what the folder says; one without modules.json says
        nothing, and what is then assumed is said in a warning. Raises UserError for a folder that lacks a file or a
        weight of the encoder, and for modules and ways to pool that are not known here.
        """
        if unknown:
            raise UserError(f"SentenceBert.from_pretrained: unknown argument {next(iter(unknown))!r}")
        sentence_config, config, where = read_sentence_folder(folder, pooling=pooling, normalize=normalize)
        arrays = checkpoint.read_weights(where)
        refuse_far_larger(config, arrays, where)
        pooler = any(name.endswith("pooler.dense.weight") for name in arrays)
        model = cls(
            config, backend, dtype, seed, sentence_config=sentence_config, add_pooling_layer=pooler, initialise=False
        )
        try:
            report = model.load_state_dict(arrays, strict=False)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if report.missing_keys:
            raise UserError(f"{where}: weights of the encoder are not in the file: {report}")
        if report:
            warn(f"{where}: {report} (what is unexpected is not used)")
        model.eval()
        return model

    def save_pretrained(self, folder: str | Path, tokenizer_files: Any = None) -> None:
        """Write a folder that sentence-transformers reads, of any release; the encoder in it is a BertModel's."""
        self.bert.save_pretrained(folder, tokenizer_files)
        write_sentence_folder(folder, self.sentence_config, self.config.hidden_size, self.max_seq_length)


def _first_rows(batch: Any, x: Tensor) -> Tensor:  # (N, C) -> (B, C)
    """The first token of each sequence; zeros where there is none."""
    packed = batch.packed
    real = packed.not_empty
    y = apply(gather_rows, x, batch.integers(packed.first_rows[real]))
    if real.all():
        return y
    return apply(scatter_rows, y, batch.integers(np.flatnonzero(real).astype(np.int32)), num_rows=len(real))
