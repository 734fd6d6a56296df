"""The book of storages: bytes once per storage, from first sight to last reference."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from narrowcast.memory.storages import Holding, Role, StorageBook, storages_of, tensors_in
from narrowcast.records.memory import CATEGORIES

CPU = torch.device("cpu")


def test_views_of_a_storage_are_counted_once() -> None:
    """A tensor, its transpose and a slice of it are one storage."""
    book = StorageBook(CPU)
    whole = torch.zeros(6, 4)

    for view in (whole, whole.t(), whole[2:3]):
        book.made(view, "m")

    assert book.total == whole.nbytes


def test_a_storage_leaves_the_book_when_the_last_view_is_gone() -> None:
    """Memory is held as long as any view lives, and not longer."""
    book = StorageBook(CPU)
    whole = torch.zeros(100)
    view = whole[:1]
    book.made(whole, "m")

    del whole
    held_by_view = book.total
    del view
    gc.collect()

    assert (held_by_view, book.total) == (400, 0)
    assert [change for _, change in book.log] == [400, -400]


def test_a_resized_storage_counts_its_new_size() -> None:
    """Freeing a storage in place (as FSDP does) frees its bytes in the book."""
    book = StorageBook(CPU)
    tensor = torch.zeros(10)
    book.made(tensor, "m")

    tensor.untyped_storage().resize_(0)
    book.resized(tensor.untyped_storage(), "")

    assert book.total == 0


def test_storages_of_another_device_are_not_counted() -> None:
    """A book counts one device; meta tensors are not on the CPU."""
    book = StorageBook(CPU)

    book.made(torch.zeros(10, device="meta"), "m")
    book.claim(torch.zeros(10, device="meta"), Role.INPUT)

    assert book.total == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
def test_a_sparse_tensor_holds_its_indices_and_values() -> None:
    """Sparse gradients of an embedding are made of two storages."""
    values = torch.ones(3)
    indices = torch.tensor([[0, 2, 4]])
    sparse = torch.sparse_coo_tensor(indices, values, (5,), check_invariants=False)

    assert sum(s.nbytes() for s in storages_of(sparse)) == values.nbytes + indices.nbytes


def test_what_is_only_read_is_not_counted_but_named() -> None:
    """A data set that a batch is taken from; a single number (a loss scale) is not named."""
    book = StorageBook(CPU)
    data, scale = torch.ones(1000), torch.tensor(2.0)

    for tensor in (data, data[:3], scale):
        book.read(tensor, "m")
    total = book.total
    book.close()

    assert total == 0
    assert book.only_read == ((4000, "m"),)


def test_an_old_storage_that_is_returned_is_unattributed() -> None:
    """A view of something from before shows a storage that the step did not make."""
    book = StorageBook(CPU)
    old = torch.ones(10)

    book.read(old, "m")
    book.made(old[:2], "m")

    found = book.find(old)
    assert found is not None
    assert (found.role, book.total) == (Role.UNATTRIBUTED, 40)


def test_a_new_storage_at_a_used_address_is_new() -> None:
    """Allocators give the same address again; what died there says nothing about what is there."""
    book = StorageBook(CPU)
    roles = set()
    for _ in range(50):
        old = torch.ones(4096)
        book.read(old, "m")
        del old
        new = torch.ones(4096)
        book.made(new, "m")
        holding = book.find(new)
        assert holding is not None
        roles.add(holding.role)
        del new

    assert roles == {Role.TEMPORARY}


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        (Role.TEMPORARY, Role.ACTIVATION, Role.ACTIVATION),
        (Role.PARAMETER, Role.ACTIVATION, Role.PARAMETER),
        (Role.CAST, Role.ACTIVATION, Role.CAST),
        (Role.ACTIVATION, Role.INPUT, Role.INPUT),
        (Role.UNATTRIBUTED, Role.ACTIVATION, Role.UNATTRIBUTED),
        (Role.UNATTRIBUTED, Role.INPUT, Role.INPUT),
        (Role.MASTER, Role.PARAMETER, Role.PARAMETER),
    ],
)
def test_what_a_storage_is_beats_what_happens_to_it(first: str, second: str, wins: str) -> None:
    """A saved parameter stays a parameter; a saved product of forward becomes an activation."""
    holding = Holding(0, 1, first, "a")

    holding.claim(second, "b")

    assert holding.role == wins
    assert holding.module == ("b" if wins == second else "a")


def test_roles_are_the_categories_of_the_record() -> None:
    """The ledger uses every category of the record and no other name."""
    roles = {value for name, value in vars(Role).items() if name.isupper()}

    assert roles == set(CATEGORIES)


@dataclass
class Batch:
    ids: Tensor
    extra: dict[str, list[Tensor]]


def test_tensors_are_found_in_any_nest() -> None:
    """Batches come as tuples, mappings, dataclasses, and mixtures of them."""
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)

    found = list(tensors_in((a, {"batch": Batch(ids=b, extra={"x": [c]})}, "text", 3, None)))

    assert [t.numel() for t in found] == [1, 2, 3]
