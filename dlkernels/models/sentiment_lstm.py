"""SentimentLSTM: a bidirectional LSTM of two layers over the words of a text."""

from types import ModuleType

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class SentimentLSTM(torch.nn.Module):
    """Logits (N, 1) of texts: words (N, T), int64, 0 behind the end of each.

    Args:
        nn: the namespace.
        words: of the vocabulary, with 0 for no word and 1 for an unknown one.
        packed: texts end at their last word, as a ``PackedSequence``; else the zeros are read too.
    """

    recipe = Recipe(
        data="text",
        epochs=5,
        embedded_epochs=4,
        loss="BCEWithLogitsLoss",
        optimiser="Adam",
        lr=1e-3,
        momentum=None,
        batch_size=30,
        metric="binary accuracy",
        threshold=0.0,
    )
    vector_size = 100  # of a word's vector

    def __init__(
        self, nn: ModuleType = dlkernels.nn, words: int = 10_002, packed: bool = True
    ) -> None:
        super().__init__()
        self.packed = packed
        self.embedding = nn.Embedding(words, self.vector_size, padding_idx=0)
        self.dropout = nn.Dropout(0.5)
        self.rnn = nn.LSTM(
            self.vector_size, 256, 2, batch_first=True, dropout=0.5, bidirectional=True
        )
        self.fc = nn.Linear(512, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.dropout(self.embedding(x))
        if self.packed:
            lengths = (x != 0).sum(1).clamp(min=1).cpu()
            embedded = pack_padded_sequence(
                embedded, lengths, batch_first=True, enforce_sorted=False
            )
        _, (hidden, _) = self.rnn(embedded)
        return self.fc(torch.cat([hidden[-2], hidden[-1]], 1))

    @torch.no_grad()
    def copy_vectors(self, words: torch.Tensor, vectors: torch.Tensor) -> None:
        """Starts the embedding of some ``words`` from ``vectors`` (len(words), vector_size), as of
        ``dlkernels.data.text.vectors``."""
        self.embedding.weight[words] = vectors.to(self.embedding.weight)
