"""The side-by-side script: BRISQUE from its files alone, and the ridge."""

import pickle
import runpy

import numpy as np
import pytest

from tests import REPOSITORY


pytest.importorskip("skimage")
SCRIPT = runpy.run_path(str(REPOSITORY / "examples/demo/compare_iqa.py"))


@pytest.fixture(scope="module")
def brisque(tmp_path_factory):
    """Files in the package's layout: two support vectors of opposite sign."""
    folder = tmp_path_factory.mktemp("brisque")
    head = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.05\nnr_class 2\ntotal_sv 2\nrho -3.5\nprobA 6.3\nSV\n"
    vectors = ["10 1:0.5 2:-0.25 36:1", "-4 3:0.1"]
    (folder / "svm.txt").write_text(head + "\n".join(vectors) + "\n")
    ranges = {"min_": [0.0] * 36, "max_": [2.0] * 36}
    (folder / "normalize.pickle").write_bytes(pickle.dumps(ranges))
    return SCRIPT["Brisque"](folder)


def test_the_support_vector_regression(brisque):
    assert (brisque.gamma, brisque.rho) == (0.05, -3.5)
    assert brisque.vectors[0, [0, 1, 35]].tolist() == [0.5, -0.25, 1.0] and brisque.coefficients.tolist() == [10, -4]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    gray = image @ np.array([0.2125, 0.7154, 0.0721]) / 255
    x = brisque.features(gray)
    assert x.shape == (18,) and np.isfinite(brisque(image))


def test_fit_recovers_what_the_numbers_were_drawn_from(brisque):
    rng = np.random.default_rng(1)
    shape, mean, left, right = brisque.fit(rng.normal(0, 0.7, 400_000))
    assert shape == pytest.approx(2, abs=0.03) and mean == pytest.approx(0, abs=0.01)
    assert left == pytest.approx(0.49, rel=0.02) and right == pytest.approx(0.49, rel=0.02)
    laplace = rng.laplace(0, 1, 400_000)
    assert brisque.fit(laplace)[0] == pytest.approx(1, abs=0.03)
    shape, mean, left, right = brisque.fit(np.where(laplace < 0, laplace, 3 * laplace)[laplace != 0])
    assert mean > 0.5 and right == pytest.approx(9 * left, rel=0.05)


def test_a_pickle_that_names_something_callable_is_refused(brisque, tmp_path):
    import os

    (tmp_path / "svm.txt").write_text("gamma 0.05\nrho 0\nSV\n1 1:1\n")
    (tmp_path / "normalize.pickle").write_bytes(pickle.dumps({"min_": os.getcwd}))
    with pytest.raises(pickle.UnpicklingError, match="expected numbers only, found posix.getcwd"):
        SCRIPT["Brisque"](tmp_path)


def test_ridge_finds_a_linear_relation_and_its_strength():
    rng = np.random.default_rng(2)
    features = {split: rng.normal(size=(n, 6)) for split, n in {"train": 200, "validation": 50, "test": 60}.items()}
    mos = {split: x @ np.arange(6) * 5 + 50 for split, x in features.items()}
    predictions, ridge = SCRIPT["ridge_predictions"](features, mos)
    assert ridge == 1.0 and np.abs(predictions - mos["test"]).max() < 2
