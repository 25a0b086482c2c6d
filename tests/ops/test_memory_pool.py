"""Memory that is reused."""

import gc
import weakref

import torch

from ops.memory_pool import MAX_WASTE, MIN_ELEMENTS, Pool


def test_memory_is_reused_when_no_tensor_uses_it():
    pool = Pool()
    first = pool.empty(1024, 512)
    address, view = first.data_ptr(), first[3:, :7].t()
    del first
    second = pool.empty(1024, 512)
    assert second.data_ptr() != address and not pool.free_blocks  # the view still looks at it
    del view
    assert pool.empty(512, 1024).data_ptr() == address
    assert pool.bytes_in_use() == second.nbytes and len(pool.free_blocks) == 1


def test_tensors_in_use_never_share_memory():
    pool = Pool()
    tensors = [pool.empty(count, 1024).fill_(count) for count in (300, 290, 500, 300) for _ in range(3)]
    del tensors[::2]
    gc.collect()
    tensors += [pool.empty(count, 1024).fill_(-count) for count in (280, 499, 301)]
    assert all((tensor == tensor[0, 0]).all() for tensor in tensors)
    assert pool.bytes_in_use() == sum(tensor.nbytes for tensor in tensors)


def test_a_small_tensor_does_not_take_a_large_block():
    pool = Pool()
    address = pool.empty(MAX_WASTE * 1024, 300).data_ptr()
    assert pool.empty(1023, 300).data_ptr() != address
    assert pool.empty(1024, 300).data_ptr() == address


def test_small_results_are_ordinary_tensors():
    pool = Pool()
    assert pool.empty(MIN_ELEMENTS - 1).shape == (MIN_ELEMENTS - 1,)
    assert pool.bytes_in_use() == 0 and not pool.free_blocks


def test_memory_outlives_the_pool_while_a_tensor_looks_at_it():
    pool = Pool()
    tensor = pool.empty(600, 600).fill_(7.0)
    gone = weakref.ref(pool)
    del pool
    assert (tensor == 7.0).all()
    del tensor
    gc.collect()
    assert gone() is None
    assert torch.equal(Pool().empty(600, 600).fill_(1.0), torch.ones(600, 600))
