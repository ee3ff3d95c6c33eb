"""What a checkpoint's tensors become: readable as ever, and nothing stays behind for each size that was written."""

from __future__ import annotations

import ctypes

import safetensors.torch
import torch

from recsys.training.checkpoint_files import saved


def test_tensors_of_every_type_and_shape_are_read_back() -> None:
    state = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
        "bytes": torch.tensor([1, 2], dtype=torch.uint8),
        "exact": torch.tensor([1 / 3], dtype=torch.float64),
    }
    found = safetensors.torch.load(saved(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


def test_nothing_is_kept_for_each_size_that_was_written() -> None:
    before = len(ctypes._pointer_type_cache)  # type: ignore[attr-defined]
    for size in range(20_000, 20_050):
        saved({"growing": torch.zeros(size, dtype=torch.uint8)})
    assert len(ctypes._pointer_type_cache) == before  # type: ignore[attr-defined]
