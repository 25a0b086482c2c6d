"""BERT (Devlin et al. 2018, arXiv 1810.04805) with its two pre-training heads.

Packing is data, not a mode: a row holds one sequence or several.  A token attends to the tokens with the same number in
input_mask, positions restart with each sequence, and every [CLS] is gathered by its index in the row.

Legend: B rows in the batch, S tokens in a row, N heads, H head size, D = N·H hidden size, V vocabulary,
P slots for masked tokens in a row, C slots for sequences in a row.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.bert_config import ACTIVATION_NAMES, LAYER_NORM_EPS, BertConfig
from ops import cpu_layers
from ops.attention import ATTENTIONS, HASHED, KERNELS

ACTIVATIONS = dict(zip(ACTIVATION_NAMES, (nn.GELU, nn.ReLU, nn.SiLU), strict=True))
IGNORED_LABEL = -1
def gather_positions(hidden, positions):
    """hidden (B, S, D), positions (B, K) → (B, K, D)."""
    return hidden.gather(1, positions.long()[:, :, None].expand(-1, -1, hidden.shape[-1]))


def recomputed(function, autocast, *arguments):
    """function(*arguments), computed again in the backward pass, which runs outside the contexts of the forward one."""
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), autocast()),
                      determinism_check="none")  # the check needs shapes, which nested tensors do not have


class HashedDropout(nn.Dropout):
    """The same in a kernel compiled for this CPU, in fp32 and bf16."""

    def forward(self, hidden):
        return cpu_layers.dropout(hidden, self.p) if self.training else hidden


def dropout_class(attention_name: str) -> type[nn.Dropout]:
    return HashedDropout if attention_name == HASHED else nn.Dropout


class Embeddings(nn.Module):
    """The sum of word, position and segment vectors.  Positions enter the model here only: one learned vector each."""

    def __init__(self, config: BertConfig, attention_name: str):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = dropout_class(attention_name)(config.hidden_dropout_prob)

    def forward(self, input_ids, segment_ids, positions):
        total = (self.word_embeddings(input_ids) + self.position_embeddings(positions)
                 + self.token_type_embeddings(segment_ids))  # (B, S, D)
        return self.dropout(self.LayerNorm(total))


class KernelEmbeddings(Embeddings):
    """The same in kernels compiled for this CPU, in fp32 only."""

    def forward(self, input_ids, segment_ids, positions):
        return cpu_layers.embed(self, input_ids, segment_ids, positions)


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig, attention_name: str):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.implementation = ATTENTIONS[attention_name]
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, hidden):
        return hidden.view(*hidden.shape[:2], self.heads, -1).transpose(1, 2)  # (B, N, S, H)

    def forward(self, hidden, mask):
        query, key, value = (self.split_heads(linear(hidden)) for linear in (self.query, self.key, self.value))
        dropout_prob = self.dropout_prob if self.training else 0.0
        context = self.implementation.compute(query, key, value, mask, dropout_prob)  # (B, N, S, H)
        return context.transpose(1, 2).reshape(hidden.shape)  # (B, S, D)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(hidden))): the end of both halves of a post-LayerNorm layer."""

    def __init__(self, input_size: int, config: BertConfig, attention_name: str):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = dropout_class(attention_name)(config.hidden_dropout_prob)

    def forward(self, hidden, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Attention(nn.Module):
    def __init__(self, config: BertConfig, attention_name: str):
        super().__init__()
        self.self = SelfAttention(config, attention_name)
        self.output = ResidualOutput(config.hidden_size, config, attention_name)

    def forward(self, hidden, mask):
        return self.output(self.self(hidden, mask), hidden)


class DenseActivation(nn.Module):
    """activation(dense_act(hidden))."""

    def __init__(self, input_size: int, output_size: int, activation: type[nn.Module]):
        super().__init__()
        self.dense_act = nn.Linear(input_size, output_size)
        self.activation = activation()

    def forward(self, hidden):
        return self.activation(self.dense_act(hidden))


class Layer(nn.Module):
    def __init__(self, config: BertConfig, attention_name: str):
        super().__init__()
        self.attention = Attention(config, attention_name)
        activation = ACTIVATIONS[config.hidden_act]
        self.intermediate = DenseActivation(config.hidden_size, config.intermediate_size, activation)
        self.output = ResidualOutput(config.intermediate_size, config, attention_name)

    def forward(self, hidden, mask):
        hidden = self.attention(hidden, mask)
        return self.output(self.intermediate(hidden), hidden)  # (B, S, D)


class KernelLayer(Layer):
    """The same in kernels compiled for this CPU (cpu_layers.unsupported_reason); the mask is input_mask itself."""

    def forward(self, hidden, mask):
        return cpu_layers.layer(self, hidden, mask)


class Encoder(nn.Module):
    def __init__(self, config: BertConfig, attention_name: str, checkpoint_activations: bool, autocast):
        super().__init__()
        layer_class = KernelLayer if attention_name == KERNELS else Layer
        self.layer = nn.ModuleList(layer_class(config, attention_name) for _ in range(config.num_hidden_layers))
        self.checkpoint_activations = checkpoint_activations
        self.autocast = autocast

    def forward(self, hidden, mask):
        for layer in self.layer:
            if self.checkpoint_activations and self.training:
                hidden = recomputed(layer, self.autocast, hidden, mask)
            else:
                hidden = layer(hidden, mask)
        return hidden


class BertModel(nn.Module):
    """Embeddings, encoder, and the pooler over every [CLS]."""

    def __init__(self, config: BertConfig, attention_name: str, checkpoint_activations: bool, autocast):
        super().__init__()
        self.attention = ATTENTIONS[attention_name]
        self.embeddings = (KernelEmbeddings if attention_name == KERNELS else Embeddings)(config, attention_name)
        self.encoder = Encoder(config, attention_name, checkpoint_activations, autocast)
        self.pooler = DenseActivation(config.hidden_size, config.hidden_size, nn.Tanh)

    def forward(self, input_ids, input_mask, segment_ids, positions, next_sentence_positions):
        """All inputs (B, S), next_sentence_positions (B, C) → hidden states (B, S, D), pooled [CLS] (B, C, D) or, where
        there is no pooler, None.
        """
        hidden = self.embeddings(input_ids, segment_ids, positions)
        hidden = self.encoder(hidden, self.attention.mask(input_mask, slots=next_sentence_positions.shape[1]))
        pooled = None if self.pooler is None else self.pooler(gather_positions(hidden, next_sentence_positions))
        return hidden, pooled


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary; the decoder's weight is the word embedding."""

    def __init__(self, config: BertConfig, word_embeddings):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))
        self.transform = DenseActivation(config.hidden_size, config.hidden_size, ACTIVATIONS[config.hidden_act])
        self.transform.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.decoder = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.decoder.weight = word_embeddings

    def forward(self, hidden):
        return self.logits(self.transformed(hidden))  # (…, V)

    def transformed(self, hidden):
        return self.transform.LayerNorm(self.transform(hidden))  # (…, D)

    def logits(self, transformed):
        return F.linear(transformed, self.decoder.weight, self.bias)  # (…, V)


class PreTrainingHeads(nn.Module):
    def __init__(self, config: BertConfig, word_embeddings):
        super().__init__()
        self.predictions = MaskedLMHead(config, word_embeddings)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """BERT with the masked-LM and the next-sentence head; after without_nsp(), with the former alone.

    `attention_name` is one of ops.attention.ATTENTIONS.  `checkpoint_activations` recomputes each layer in the backward
    pass, under `autocast()`, which takes less memory and more time.  The losses are computed under `casts_off()`, the
    masked-LM loss in chunks of `loss_chunk` slots (0: all at once).  Both contexts are those of devices.precision.
    """

    def __init__(self, config: BertConfig, attention_name: str = "sdpa", checkpoint_activations: bool = False,
                 autocast=nullcontext, casts_off=nullcontext, loss_chunk: int = 0):
        super().__init__()
        self.config = config
        self.autocast = autocast
        self.casts_off = casts_off
        self.loss_chunk = loss_chunk
        self.use_kernels = attention_name == KERNELS
        assert not self.use_kernels or cpu_layers.unsupported_reason(config) is None
        self.bert = BertModel(config, attention_name, checkpoint_activations, autocast)
        self.cls = PreTrainingHeads(config, self.bert.embeddings.word_embeddings.weight)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        """Weights N(0, initializer_range), biases 0; PyTorch starts LayerNorm with weight 1 and bias 0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def to_device(self, device: torch.device) -> "BertForPreTraining":
        """Move to a device, and tie the decoder again: a move that changes the tensors' type copies a weight twice."""
        self.to(device)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        return self

    def without_nsp(self) -> "BertForPreTraining":
        """Take away the next-sentence head, and the pooler that only it trains: for data made with --no_nsp."""
        self.bert.pooler = self.cls.seq_relationship = None
        return self

    @property
    def has_nsp(self) -> bool:
        return self.cls.seq_relationship is not None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses that forward() returns."""
        return ("loss", "mlm_loss", "nsp_loss") if self.has_nsp else ("loss", "mlm_loss")

    def logits(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A batch in the packed form of shards.SCHEMA → logits of the masked slots (B, P, V) and of NSP (B, C, 2)."""
        masked, nsp_logits = self.encode(batch)
        return self.cls.predictions(masked), nsp_logits

    def encode(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A batch → hidden states of the masked slots (B, P, D), NSP logits (B, C, 2), or None without that head."""
        hidden, pooled = self.bert(batch["input_ids"], batch["input_mask"], batch["segment_ids"], batch["positions"],
                                   batch["next_sentence_positions"])
        nsp_logits = self.cls.seq_relationship(pooled) if self.has_nsp else None
        return gather_positions(hidden, batch["masked_lm_positions"]), nsp_logits

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """The losses of a batch as fp32 scalars: loss = mlm_loss + nsp_loss, or mlm_loss alone without that head."""
        masked, nsp_logits = self.encode(batch)
        if self.use_kernels or self.loss_chunk:
            mlm_loss = self.mlm_loss_without_logits(masked, mlm_labels(batch))
            with self.casts_off():
                return with_nsp_loss(mlm_loss, nsp_logits, batch)
        mlm_logits = self.cls.predictions(masked)
        with self.casts_off():
            return losses(mlm_logits, nsp_logits, batch)

    def mlm_loss_without_logits(self, masked, labels) -> torch.Tensor:
        """Mean cross entropy over the masked tokens without the logits of all of them in memory.

        In a kernel, or with those of loss_chunk slots at a time, which the backward pass recomputes.  masked (B, P, D):
        the hidden states of the slots, labels (B, P).
        """
        head = self.cls.predictions
        hidden, labels = head.transformed(masked).flatten(0, 1), labels.flatten()
        if self.use_kernels:
            return cpu_layers.kernel_cross_entropy(hidden, head.decoder.weight, head.bias, labels)
        chunks = zip(hidden.split(self.loss_chunk), labels.split(self.loss_chunk), strict=True)
        sums = [recomputed(self.chunk_loss, self.autocast, *chunk) for chunk in chunks]
        with self.casts_off():
            return torch.stack(sums).sum() / labels_in_use(labels)

    def chunk_loss(self, hidden, labels) -> torch.Tensor:
        logits = self.cls.predictions.logits(hidden)
        with self.casts_off():
            return summed_cross_entropy(logits, labels)


def mlm_labels(batch: dict) -> torch.Tensor:
    """The masked tokens, IGNORED_LABEL in empty slots (position 0 is [CLS], which is never masked).  (B, P)"""
    used = (batch["masked_lm_positions"] != 0).long()
    return batch["masked_lm_ids"].long() * used + IGNORED_LABEL * (1 - used)


def nsp_labels(batch: dict) -> torch.Tensor:
    """1 = the second segment is random, 0 = it follows, IGNORED_LABEL in empty slots.  (B, C)"""
    used = batch["next_sentence_weights"].long()
    return batch["next_sentence_labels"].long() * used + IGNORED_LABEL * (1 - used)


def losses(mlm_logits, nsp_logits, batch: dict) -> dict[str, torch.Tensor]:
    """Mean cross entropy over the masked tokens, and over the sequences, and their sum, in fp32."""
    return with_nsp_loss(mean_cross_entropy(mlm_logits, mlm_labels(batch)), nsp_logits, batch)


def with_nsp_loss(mlm_loss, nsp_logits, batch: dict) -> dict[str, torch.Tensor]:
    """The losses of a batch; without NSP logits, that of the masked tokens alone."""
    if nsp_logits is None:
        return {"loss": mlm_loss, "mlm_loss": mlm_loss}
    return summed(mlm_loss, mean_cross_entropy(nsp_logits, nsp_labels(batch)))


def summed(mlm_loss, nsp_loss) -> dict[str, torch.Tensor]:
    return {"loss": mlm_loss + nsp_loss, "mlm_loss": mlm_loss, "nsp_loss": nsp_loss}


def mean_cross_entropy(logits, labels):
    """Cross entropy averaged over the slots in use, in fp32; 0, not NaN, where no slot is."""
    return summed_cross_entropy(logits.flatten(0, 1), labels.flatten()) / labels_in_use(labels)


def summed_cross_entropy(logits, labels):
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")


def labels_in_use(labels):
    """Number of labels that are not ignored, as a divisor: at least 1.  A scalar tensor, fp32."""
    return (labels != IGNORED_LABEL).sum().clamp(min=1).float()
