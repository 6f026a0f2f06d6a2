"""The values of a matrix, with or without leading dimensions, in other layouts of memory."""

import torch


def same_memory(x):
    return x


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced_rows(x):
    return x.repeat_interleave(2, 0)[::2]


def sliced_columns(x):
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def every_second(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def expanded(x):
    """The first row, for all."""
    return x[:1].expand_as(x)


def offset(x):
    return torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x)
