"""Tables: reading, splitting, standardising, the Gaussian score, and every refusal."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import cnf.data as data_package
from cnf.data import gaussian_log_prob, read_table, sklearn_table, split_table, tabular

REAL = Path(__file__).parents[2].parent / "shared" / "data"
FILES = {
    "UCI/winequality-red.csv": (1599, 12),
    "UCI/concrete.txt": (1030, 9),
    "UCI/power-plant.txt": (9568, 5),
    "UCI/protein-tertiary-structure.txt": (45730, 10),
    "MINIBOONE/test.npy": (3648, 43),
    "MINIBOONE/val.npy": (3284, 43),
}
SMALL = np.array([[1.0, 2.5], [-3.0, 4e3]])


def write(folder: Path, text: str | bytes, name: str = "table.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(n: int = 100, d: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 2, (n, d))


@pytest.mark.parametrize(
    "text",
    [
        "1,2.5\n-3,4e3\n",
        "1;2.5\n-3;4e3",
        "1 2.5\n-3 4e3\n\n",
        "1.0 \t2.5 \t\r\n-3.0 \t4000 \r\n",
        "height,weight\n1,2.5\n-3,4000\n",
        '"the height, in m";"weight"\n1;2.5\n"-3";4000\n',
        "# made by hand\nheight weight\n1 2.5\n-3 4e3\n",
        "\ufeff1, 2.5\n-3, 4e3\n",
        "1,2.5\n-3,4_000\n",
        "1|2.5\n-3|4e3\n",
        "1,2.5,\n-3,4e3,\n",
        "1\t2.5\t\n-3\t4e3\n",
        "1 \t 2.5\n-3\t4e3",
        "the height\tthe weight\r\n1\t2.5\r\n-3\t4e3\r\n",
        '"the height" "weight"\n1 2.5\n"-3" "4e3"\n',
        "\ufeff# a comment\n,weight\n1,2.5\n-3,4e3\n",
    ],
)
def test_reads_text(tmp_path, text):
    table = read_table(write(tmp_path, text))
    assert table.dtype == np.float64
    np.testing.assert_array_equal(table, SMALL)


def test_reads_one_column_and_keeps_nan(tmp_path):
    np.testing.assert_array_equal(read_table(str(write(tmp_path, "1\n2\n"))), [[1.0], [2.0]])
    np.testing.assert_array_equal(
        read_table(write(tmp_path, "1,nan\n-inf,2\n")), [[1.0, math.nan], [-math.inf, 2.0]]
    )


def test_reads_arrays(tmp_path):
    np.save(tmp_path / "a.npy", SMALL.astype(np.float32))
    np.savez(tmp_path / "one.npz", anything=SMALL)
    np.savez(tmp_path / "two.npz", train=SMALL, test=np.arange(4).reshape(2, 2))
    for table in (
        read_table(tmp_path / "a.npy"),
        read_table(tmp_path / "one.npz"),
        read_table(tmp_path / "two.npz", key="train"),
    ):
        assert table.dtype == np.float64
        np.testing.assert_array_equal(table, SMALL)
    assert read_table(tmp_path / "two.npz", key="test").dtype == np.float64
    for key in (None, "val"):
        with pytest.raises(
            ValueError, match=rf"key must be one of 'train', 'test' for .*two.npz', got {key!r}"
        ):
            read_table(tmp_path / "two.npz", key=key)
    with pytest.raises(ValueError, match=r"key='x' only fits a \.npz file"):
        read_table(tmp_path / "a.npy", key="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows of numbers"),
        ("\n \n# nothing\n", "holds no rows of numbers"),
        ("height,weight\n", "holds no rows of numbers"),
        ("1,2\n3,4,5\n", "line 2: 3 cells, but line 1 has 2; expected rows of equal length"),
        ("a b\n\n1 2\n3\n", "line 4: 1 cells, but line 1 has 2 names in the header"),
        ("1,2\n3,?\n", r"line 2, column 2: '\?' is not a number; fill in"),
        ("1,2\n3,\n", "line 2, column 2: the cell is empty"),
        ("1;2\n3,5;4\n", "line 2, column 1: '3,5' is not a number"),
        ("1,red\n2,blue\n", "line 1, column 2: 'red' is not a number; encode text as numbers"),
        ("m,color\n1,red\n", r"line 2, column 2 \('color'\): 'red' is not a number; encode text"),
        ("1\t2,5\n", "is not a number"),
        ("1\t2\n3\t4,5\n", "column 2: '4,5' is not a number; write decimals with a point"),
        ("a\tb\tc\n1\t\t2\n\t3\t4\n5\t6\t\n", r"line 2, column 2 \('b'\): the cell is empty"),
        ("a\tb\tc\n\t3\t4\n", r"line 2, column 1 \('a'\): the cell is empty"),
        ("a\tb\tc\n5\t6\t\n", r"line 2, column 3 \('c'\): the cell is empty"),
        ("1\t\t2\n\t3\t4\n", "line 1, column 2: the cell is empty"),
        ("1||2\n|3|4\n", "line 1, column 2: the cell is empty"),
        ("a;b;c\n1;;2\n", r"line 2, column 2 \('b'\): the cell is empty; fill in missing values"),
        ("a,b,c\n1,2\n3,4\n", "line 2: 2 cells, but line 1 has 3 names in the header"),
        ("a b c\n1 2\n3 4\n", "line 2: 2 cells, but line 1 has 3 names .*begin that line with #"),
        ("a\tb\n1\t2\t3\n", "line 2: 3 cells, but line 1 has 2 names"),
        ("1:2\n3\n4\n", "line 1, column 1: '1:2' is not a number"),
        ("NA,NA\n1,2\n", "line 1, column 1: 'NA' is not a number; fill in"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_text_that_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"a.npy has shape \(3,\); expected a matrix \(N, D\): use reshape"),
        (np.zeros((2, 2, 2)), r"has shape \(2, 2, 2\)"),
        (np.zeros((0, 2)), r"is empty, of shape \(0, 2\)"),
        (np.zeros((2, 2), complex), "has dtype complex128; expected real numbers"),
        (np.array([["1", "b"]]), r"has dtype <U1; .* at \[0, 1\] 'b' is not a number; encode text"),
        (np.array([["1", "2"]]), r"has dtype <U1; .* convert it with .astype\(float\)"),
        (
            np.array([[1, "b"]], dtype=object),
            "cannot be read: .*pickled objects, which are refused",
        ),
    ],
)
def test_arrays_that_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.npy")


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv' is not a file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_table(tmp_path)
    np.savez(tmp_path / "whole.npz", a=SMALL)
    np.save(tmp_path / "whole.npy", rows())
    for name in ("whole.npz", "whole.npy"):
        data = (tmp_path / name).read_bytes()
        for size in (0, 3, 60, len(data) // 2):
            with pytest.raises(ValueError, match="cannot be read"):
                read_table(write(tmp_path, data[:size], "cut" + name[-4:]))


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    if not (REAL / name).exists():
        pytest.skip("the data are not here")
    data = read_table(REAL / name)
    assert data.shape == FILES[name]
    table = split_table(data)
    assert bool(gaussian_log_prob(table.train, table.test).isfinite().all())


def test_published_gaussian_score_of_miniboone():
    """A Gaussian fitted to the validation rows scores -37.72 on the test rows (a fit to the
    training rows: -37.24 +- 1.07).
    """
    if not (REAL / "MINIBOONE").exists():
        pytest.skip("the data are not here")
    val, test = (
        torch.from_numpy(read_table(REAL / "MINIBOONE" / name)) for name in ("val.npy", "test.npy")
    )
    assert float(gaussian_log_prob(val, test).mean()) == pytest.approx(-37.72, abs=0.01)


def test_split_is_a_partition_in_standard_units():
    data = rows(1000)
    table = split_table(data, seed=3, val=0.2, test=0.15, dtype=torch.float64)
    assert [len(part) for part in (table.train, table.val, table.test)] == [650, 200, 150]
    together = table.restore(torch.cat((table.train, table.val, table.test)))
    np.testing.assert_allclose(np.sort(together, 0), np.sort(data, 0), rtol=1e-12)
    torch.testing.assert_close(table.train.mean(0), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(table.train.std(0, correction=0), torch.ones(3).double())
    assert abs(float(table.val.mean())) > 1e-4  # by the statistics of the training rows alone
    torch.testing.assert_close(table.standardise(table.restore(table.val)), table.val)
    assert table.names == ("x0", "x1", "x2")


def test_split_goes_by_the_seed_and_leaves_global_generators_alone():
    data, state, old = rows(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (
        split_table(data, seed=1),
        split_table(torch.from_numpy(data), seed=1),
        split_table(data, seed=2),
    )
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    assert first.train.dtype == torch.float32
    assert first.mean.dtype == torch.float64
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(old, np.random.get_state()[1])


def test_no_validation_or_test_rows():
    table = split_table(rows(), val=0, test=0)
    assert table.train.shape == (100, 3)
    assert table.val.shape == (0, 3)
    assert table.test.shape == (0, 3)


def test_log_det_standardisation_changes_the_units():
    data = rows(500) * [1.0, 10.0, 0.01]
    table = split_table(data, dtype=torch.float64)
    in_standard_units = gaussian_log_prob(table.train, table.test) + table.log_det_standardisation
    in_own_units = gaussian_log_prob(table.restore(table.train), table.restore(table.test))
    torch.testing.assert_close(in_standard_units, in_own_units)


def test_constant_columns():
    data = rows(50, 4)
    data[:, [1, 3]] = 0.1
    with pytest.raises(
        ValueError,
        match=r"constant columns among the training rows: 1 \('b'\), 3 \('d'\); .*drop_constant",
    ):
        split_table(data, names=("a", "b", "c", "d"))
    table = split_table(data, names=("a", "b", "c", "d"), drop_constant=True)
    assert table.names == ("a", "c")
    assert table.train.shape == (40, 2)
    assert table.mean.shape == (2,)
    with pytest.raises(ValueError, match="no column is left to model"):
        split_table(np.ones((50, 2)), drop_constant=True)


def with_bad_rows(count: int) -> np.ndarray:
    data = rows(50)
    data[2 * np.arange(count), 1] = math.nan
    data[0, 0] = math.inf
    return data


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (with_bad_rows(3), {}, "data has NaN or infinity in 3 of 50 rows: 0, 2, 4; remove"),
        (with_bad_rows(12), {}, "in 12 of 50 rows: 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, ...; remove"),
        (np.zeros(5), {}, r"data has shape \(5,\)"),
        (
            np.array([[1, None]], object),
            {},
            r"data has dtype object; .* at \[0, 1\] None .* fill in",
        ),
        (np.array([[1], ["red"]], object), {}, r"at \[1, 0\] 'red' is not a number; encode text"),
        (torch.zeros(3, 3, dtype=torch.complex64), {}, "data has dtype complex64"),
        (rows(), {"val": -0.1}, r"val must be a fraction in \[0, 1\), got -0.1"),
        (rows(), {"test": 1.0}, r"test must be a fraction in \[0, 1\), got 1.0"),
        (rows(), {"test": math.nan}, "test must be a fraction"),
        (rows(), {"val": 0.5, "test": 0.5}, r"val \+ test must be below 1, got 0.5 \+ 0.5"),
        (rows(4), {}, "data has 4 rows, too few: val=0.1 and test=0.1 leave 4 / 0 / 0 rows"),
        (rows(1), {"val": 0, "test": 0}, "data has 1 rows, too few"),
        (
            rows(),
            {"names": ("a", "b")},
            r"names must hold one name for each of 3 columns, got \('a', 'b'\)",
        ),
        (rows(), {"names": "abc"}, "names must hold one name for each of 3 columns, got 'abc'"),
    ],
)
def test_tables_that_are_refused(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_table(data, **arguments)


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e-30, 1e30, 1e200, 1e307])
def test_columns_of_any_size_are_standardized(size):
    data = rows()
    expected, table = split_table(data), split_table(data * [1, size, 1])
    np.testing.assert_allclose(table.train, expected.train, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.std[1], size * expected.std[1], rtol=1e-9)
    difference = expected.log_det_standardisation - table.log_det_standardisation
    assert difference == pytest.approx(math.log(size), rel=1e-9)


def test_columns_that_leave_the_range_are_refused():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    data = rows() * [1, 1e-200, 1]
    data[order[-1], 1] = 1e200  # a row of the test
    with pytest.raises(ValueError, match=r"cannot be standardized in torch.float32: 1 \('x1'\)"):
        split_table(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.eye(3).to_sparse(), r"data is a sparse tensor .*use data.to_dense\(\)"),
        (torch.zeros(9, 2, device="meta"), "data is on the meta device, .* such as device='cpu'"),
    ],
)
def test_tensors_without_values_are_refused(data, message):
    with pytest.raises(TypeError, match=message):
        split_table(data)


def test_bfloat16_is_read():
    data = torch.from_numpy(rows()).bfloat16()
    assert torch.equal(split_table(data).train, split_table(data.double()).train)


def test_integer_dtype_is_refused():
    with pytest.raises(TypeError, match=r"dtype must be a floating-point type, got torch\.int64"):
        split_table(rows(), dtype=torch.int64)


def test_gaussian_against_scipy():
    train, x = rows(200) @ rows(3, 3, 1), rows(20) @ rows(3, 3, 1)
    truth = stats.multivariate_normal(train.mean(0), np.cov(train.T, ddof=0)).logpdf(x)
    result = gaussian_log_prob(torch.from_numpy(train), torch.from_numpy(x))
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, truth, rtol=1e-9)
    batched = gaussian_log_prob(torch.from_numpy(train), torch.from_numpy(x).reshape(4, 5, 3))
    torch.testing.assert_close(batched, result.reshape(4, 5))
    assert gaussian_log_prob(torch.from_numpy(train), torch.zeros(0, 3)).shape == (0,)


def test_gaussian_on_nearly_dependent_columns():
    train = torch.from_numpy(rows(200))
    train[:, 2] = train[:, 0] + 1e-4 * train[:, 2]
    assert bool(gaussian_log_prob(train, train).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariance_names_the_columns(dtype):
    data = rows(200, 6)
    data[:, 3] = 2 * data[:, 0] - data[:, 1] + 4
    data[:, 4] = 7
    data[:, 5] = data[:, 2]
    train = torch.from_numpy(data).to(dtype)
    message = "column 4 is constant; column 3 is a linear combination of 0, 1; .* of 2; leave"
    with pytest.raises(ValueError, match=message):
        gaussian_log_prob(train, train)


@pytest.mark.parametrize(
    ("train", "x", "message"),
    [
        (torch.zeros(5), torch.zeros(5), r"do not fit: got \(5,\) and \(5,\)"),
        (torch.zeros(5, 3), torch.zeros(5, 2), r"do not fit: got \(5, 3\) and \(5, 2\)"),
        (
            torch.randn(3, 3),
            torch.zeros(3),
            "train has 3 rows of 3 columns; the covariance needs more rows",
        ),
        (torch.full((5, 2), math.nan), torch.zeros(2), "train has NaN or infinity in 5 of 5 rows"),
    ],
)
def test_gaussian_arguments_that_are_refused(train, x, message):
    with pytest.raises(ValueError, match=message):
        gaussian_log_prob(train, x)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("breast_cancer", (569, 30)),
        ("diabetes", (442, 10)),
        ("iris", (150, 4)),
        ("wine", (178, 13)),
    ],
)
def test_sklearn_tables(name, shape):
    pytest.importorskip("sklearn")
    table = sklearn_table(name)
    assert table.shape == shape
    assert table.dtype == np.float64


def test_sklearn_table_says_what_is_wrong(monkeypatch):
    with pytest.raises(
        ValueError, match="name must be one of breast_cancer, diabetes, iris, wine, got 'digits'"
    ):
        sklearn_table("digits")

    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tabular, "import_module", refuse)
    with pytest.raises(ImportError, match=r"pip install \"cnf\[examples\]\""):
        sklearn_table()


def test_importing_needs_torch_and_numpy_alone():
    for path in Path(data_package.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in getattr(node, "names", ())]
            )
            roots = {module.split(".")[0] for module in modules}
            assert roots <= {"torch", "numpy", "cnf", *sys.stdlib_module_names}, path
