"""An architecture is one row of a table: encode, columns and sparse encoding all follow it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpo_core.errors import FPOError
from fpo_core.sae.architectures import ARCHITECTURES, Activated, Architecture
from fpo_core.sae.coder import SparseCoder, load_coder
from tests.fpo_core.sae_files import D_SAE, columns_are_exact, inputs, write


def prolu(x, weight, vectors):
    """ProLU (Taggart 2024): m where m and m + b are positive."""
    m = x @ weight
    return Activated(m, (m > 0) & (m + vectors["b_enc"] > 0))


def powered(x, weight, vectors):
    """A made-up one with a vector that no other has, and a value that is no pre-activation."""
    m = x @ weight + vectors["b_enc"]
    return Activated(m.abs() * vectors["gain"].exp(), m > vectors["floor"])


def dense(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
    token, feature, value = coder.active(x)
    found = torch.zeros(len(x), coder.d_sae)
    found[token, feature] = torch.tensor(value)
    return found


def one_function(coder: SparseCoder, x: torch.Tensor, wanted: torch.Tensor) -> None:
    assert 0 < int((wanted > 0).sum()) < wanted.numel()
    torch.testing.assert_close(coder.encode(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense(coder, x), wanted, rtol=1e-5, atol=1e-6)
    columns_are_exact(coder, x)


def test_prolu_takes_one_row(tmp_path, monkeypatch):
    """Before, ``active`` took it for a ReLU."""
    folder = write(tmp_path, "standard", architecture="prolu")
    with pytest.raises(FPOError, match="architecture 'prolu' is not supported"):
        load_coder(folder)
    monkeypatch.setitem(ARCHITECTURES, "prolu", Architecture(("b_enc",), prolu))
    coder, x = load_coder(folder), inputs()
    m = (x - coder.b_dec) @ coder.W_enc
    one_function(coder, x, torch.where((m > 0) & (m + coder.b_enc > 0), m, 0.0))
    assert not torch.equal(coder.encode(x) > 0, m + coder.b_enc > 0)


def test_an_architecture_with_vectors_of_its_own(tmp_path, monkeypatch):
    row = Architecture(("b_enc", "gain", "floor"), powered)
    monkeypatch.setitem(ARCHITECTURES, "powered", row)
    file = write(tmp_path, "standard", architecture="powered") / "sae_weights.safetensors"
    own = {"gain": torch.linspace(-1, 1, D_SAE), "floor": torch.linspace(0, 1, D_SAE)}
    save_file({**load_file(file), **own}, file)
    coder, x = load_coder(tmp_path).to("cpu"), inputs()
    pre = (x - coder.b_dec) @ coder.W_enc + coder.b_enc
    wanted = pre.abs() * own["gain"].exp() * (pre > own["floor"])
    one_function(coder, x, wanted)
    save_file({**load_file(file), "gain": torch.zeros(3)}, file)
    with pytest.raises(FPOError, match=r"gain has the shape \(3,\)"):
        load_coder(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_one_activation(tmp_path, architecture):
    coder, x = load_coder(write(tmp_path, architecture)), inputs()
    one_function(coder, x, coder.encode(x))


def test_an_architecture_without_a_row_is_an_error(tmp_path):
    coder = load_coder(write(tmp_path, "standard"))._replace(architecture="novel")
    for read in (coder.encode, coder.active, lambda x: coder.encode_columns(x, torch.tensor([1]))):
        with pytest.raises(KeyError, match="novel"):
            read(inputs())


def test_planning_reads_an_architecture_without_torch(tmp_path):
    folder = write(tmp_path, "gated")
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "gated"
    code = (
        "import sys; from fpo_core.sae.source import declared_width; "
        "print(declared_width(sys.argv[1]), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, check=True)
    assert said.stdout.split() == [str(D_SAE).encode(), b"False"]
