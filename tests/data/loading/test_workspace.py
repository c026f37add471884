import torch

from next.data.loading.workspace import Workspace


def test_memory_that_somebody_holds_is_not_lent_again():
    workspace = Workspace()
    lent = [workspace.lend((4, 5)).fill_(number) for number in range(3)]
    for number, tensor in enumerate(lent):
        assert tensor.shape == (4, 5)
        assert (tensor == number).all()


def test_memory_that_nobody_holds_is_lent_again():
    workspace = Workspace()
    first = workspace.lend((1000,))
    place = first.data_ptr()
    del first
    assert workspace.lend((1000,)).data_ptr() == place
    assert workspace.lend((10, 7)).data_ptr() == place, "a smaller tensor fits too"


def test_a_view_holds_the_memory():
    workspace = Workspace()
    view = workspace.lend((10, 10)).fill_(7).movedim(0, 1)[3:, 2]
    other = workspace.lend((10, 10)).fill_(0)
    assert (view == 7).all()
    assert other.data_ptr() != view.untyped_storage().data_ptr()


def test_a_tensor_saved_for_a_backward_pass_holds_the_memory():
    workspace = Workspace()
    weight = torch.ones(8, requires_grad=True)
    loss = (weight * workspace.lend((8,)).fill_(3)).sum()
    workspace.lend((8,)).fill_(0)
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad == 3).all()


def test_kept_tensors_are_the_same_memory_by_name():
    workspace = Workspace()
    first = workspace.keep("lines", (6, 4), torch.uint8)
    other = workspace.keep("moved", (6, 4), torch.uint8)
    again = workspace.keep("lines", (3, 4), torch.uint8)
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (3, 4)
    assert other.data_ptr() != first.data_ptr()
    assert workspace.keep("lines", (60, 4), torch.uint8).shape == (60, 4)
