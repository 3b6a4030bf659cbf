"""Local models of every kind: what goes in, what comes out, what identifies them, and what is refused."""

import pickle  # noqa: TID251 - what these tests made themselves
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from trunkline import errors, local_features, local_model
from trunkline_wire.preprocess import preprocess_image
from trunkline_wire.specs import Preprocessing, local_fingerprint, local_space

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def pixels(images, size):
    """Bring pictures to a size as everyone does."""
    preprocessing = Preprocessing(size, 1.0, "bicubic", (0, 0, 0), (1, 1, 1))
    return np.stack([preprocess_image(Image.fromarray(one), preprocessing) for one in images])


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), np.uint8)


def onnx_file(path, nodes, inputs, outputs, constants=()):
    """Write an ONNX file."""
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node(*one[:3], **(one[3] if len(one) > 3 else {})) for one in nodes],
        "local",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def make_onnx(tmp_path):
    """Write files that pass their input on, flattened or not."""
    from onnx import TensorProto

    def make(name="m.onnx", *, kind="FLOAT", shape=("B", 3, 8, 8), out_kind=None, op="Identity", out_shape=None):
        return onnx_file(
            tmp_path / name,
            [(op, ["x"], ["y"])],
            [("x", getattr(TensorProto, kind), shape)],
            [("y", getattr(TensorProto, out_kind or kind), shape if out_shape is None else out_shape)],
        )

    return make


class TestFunctions:
    def test_pictures_go_in_as_pixels(self, images):
        seen = []
        local = local_model(lambda x: seen.append(x) or x.mean(axis=(1, 2)), name="f", version="1", input_size=8)
        features = local.run(images)
        assert features.shape == (5, 3) and features.dtype == np.float32
        assert seen[0].dtype == np.uint8
        np.testing.assert_array_equal(seen[0], pixels(images, 8))

    def test_rows_as_they_are(self):
        rows = np.random.default_rng(0).random((4, 2, 3))
        local = local_model(lambda x: x * 2, name="f", version="1")
        np.testing.assert_allclose(local.run(rows), rows.reshape(4, 6) * 2, rtol=1e-6)
        np.testing.assert_allclose(local.run(list(rows)), rows.reshape(4, 6) * 2, rtol=1e-6)

    def test_texts(self):
        local = local_model(lambda x: [[len(one), one.count("a")] for one in x], name="text", version="1")
        assert local.run(["banana", "kiwi"]).tolist() == [[6, 3], [4, 0]]

    def test_table(self):
        pandas = pytest.importorskip("pandas")
        local = local_model(lambda x: x, name="table", version="1")
        assert local.run(pandas.DataFrame({"a": [1.0, 2.0], "b": [3, 4]})).tolist() == [[1, 3], [2, 4]]

    def test_a_few_rows_at_a_time(self):
        sizes = []
        local = local_model(lambda x: sizes.append(len(x)) or x, name="f", version="1", batch_rows=3)
        assert local.run(np.arange(8.0)).shape == (8, 1) and sizes == [3, 3, 2]

    def test_pictures_are_decoded_as_they_are_needed(self, images, monkeypatch):
        from trunkline._local_rows import PictureRows

        events, content = [], PictureRows.content
        monkeypatch.setattr(PictureRows, "content", lambda self, n: events.append("decode") or content(self, n))
        local = local_model(
            lambda x: events.append("run") or x.mean(axis=(1, 2)), name="f", version="1", input_size=4, batch_rows=2
        )
        assert local.run(images).shape == (5, 3)
        assert events == ["decode", "decode", "run"] * 2 + ["decode", "run"]

    def test_output_that_is_used_again(self):
        """A model may write each batch's output into the same memory."""
        memory = np.empty((2, 1), np.float32)

        def reuse(x):
            memory[:] = x[:, None]
            return memory

        local = local_model(reuse, name="f", version="1", batch_rows=2)
        assert local.run(np.arange(4.0)).ravel().tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("function", "error", "said"),
        [
            (lambda x: x[:-1], errors.ShapeMismatchError, r"gave shape \(2, 2\) for 3 rows"),
            (lambda x: x.sum(), errors.ShapeMismatchError, r"gave shape \(\) for 3 rows"),
            (lambda x: x[:, :0], errors.ShapeMismatchError, "gave 0 numbers a row"),
            (lambda x: np.zeros((len(x), 65_537)), errors.ShapeMismatchError, "65537 numbers a row; 1 to 65536"),
            (lambda x: x.astype(str), errors.DtypeMismatchError, "numbers are needed"),
            (lambda x: x + 1j, errors.DtypeMismatchError, "gave complex128"),
            (lambda x: None, errors.DtypeMismatchError, "gave object"),
            (lambda x: [[1], [2, 3], [4]], errors.DtypeMismatchError, "that is no array"),
            (lambda x: torch.zeros(3, 1, requires_grad=True), errors.DtypeMismatchError, "Tensor that is no array"),
            (lambda x: np.where(x > 4, np.nan, x), errors.NotFiniteError, "row 2: the local model 'f'"),
            (lambda x: x * 1e300, errors.NotFiniteError, "row 1"),
        ],
        ids=["rows", "scalar", "nothing", "wide", "text", "complex", "none", "ragged", "tensor", "nan", "overflow"],
    )
    def test_what_no_features_are(self, function, error, said):
        local = local_model(function, name="f", version="1")
        with pytest.raises(error, match=said):
            local.run(np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 0.0]]))

    def test_width_stays_what_it_was(self):
        local = local_model(lambda x: x, name="f", version="1")
        with pytest.raises(errors.InvalidArgumentError, match="not known before it has run"):
            _ = local.space
        local.run(np.zeros((2, 3)))
        assert local.width == 3
        with pytest.raises(errors.ShapeMismatchError, match="gave 4 numbers a row, and 3 before"):
            local.run(np.zeros((2, 4)))

    @pytest.mark.parametrize(
        ("rows", "error", "said"),
        [
            ([], errors.EmptyBatchError, "no rows"),
            (np.zeros((0, 3)), errors.EmptyBatchError, "no rows"),
            ([np.zeros(2), np.zeros(3)], errors.ShapeMismatchError, "row 1 .* has shape .3,.; row 0 has .2,."),
            ([np.zeros(2), None], errors.DtypeMismatchError, "row 1 .* is a NoneType"),
            pytest.param([Image.new("RGB", (2, 2)).getexif], errors.DtypeMismatchError, "method", id="a method"),
            (np.array([1, "a"], dtype=object), errors.DtypeMismatchError, "row 1 .* is a str"),
            (np.array([[1, None]], dtype=object), errors.DtypeMismatchError, "row 0 .* is a ndarray"),
            (np.float32(3), errors.ShapeMismatchError, "single"),
            ("text", errors.ShapeMismatchError, "single str"),
            (7, errors.ShapeMismatchError, "single int"),
        ],
        ids=str,
    )
    def test_what_no_rows_are(self, rows, error, said):
        with pytest.raises(error, match=said):
            local_model(lambda x: x, name="f", version="1").run(rows)

    def test_broken_picture_is_named(self, images):
        local = local_model(lambda x: x, name="f", version="1", input_size=4)
        with pytest.raises(errors.CorruptImageError, match="row 1"):
            local.run([images[0], b"no picture"])

    def test_width_is_found_with_the_first_row_that_can_be_read(self, images):
        local = local_model(lambda x: x.reshape(len(x), -1), name="f", version="1", input_size=2)
        assert local.find_width(local.rows([b"no picture", images[0]])) == 12
        with pytest.raises(errors.CorruptImageError, match="row 0"):
            local_model(lambda x: x, name="f", version="1", input_size=2).find_width(local.rows([b"no", b"picture"]))

    def test_errors_of_the_function_are_its_own(self):
        local = local_model(lambda x: 1 / 0, name="f", version="1")
        with pytest.raises(ZeroDivisionError):
            local.run(np.zeros(2))


class TestOnnx:
    @pytest.mark.parametrize("normalised", [{}, {"mean": MEAN, "std": STD}], ids=["raw", "normalised"])
    def test_floats(self, make_onnx, images, normalised):
        local = local_model(make_onnx(), name="m", input_size=8, threads=1, **normalised)
        x = pixels(images, 8).transpose(0, 3, 1, 2) / 255
        if normalised:
            x = (x - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(local.run(images), x.reshape(5, -1), atol=1e-5)

    def test_uint8(self, tmp_path, images):
        from onnx import TensorProto

        path = onnx_file(
            tmp_path / "u.onnx",
            [("Cast", ["x"], ["y"], {"to": TensorProto.FLOAT})],
            [("x", TensorProto.UINT8, ["B", 8, 8, 3])],
            [("y", TensorProto.FLOAT, ["B", 8, 8, 3])],
        )
        local = local_model(path, name="m", input_size=8)
        np.testing.assert_array_equal(local.run(images), pixels(images, 8).reshape(5, -1))
        with pytest.raises(errors.InvalidArgumentError, match="mean and std change nothing"):
            local_model(path, name="m", input_size=8, mean=0.5)
        with pytest.raises(errors.ShapeMismatchError, match=r"\[8, 8, 3\] of uint8; input_size=9 makes \[9, 9, 3\]"):
            local_model(path, name="m", input_size=9)

    def test_any_size(self, make_onnx, images):
        local = local_model(make_onnx(shape=("B", 3, "h", "w")), name="m", input_size=4)
        assert local.run(images).shape == (5, 48)

    def test_rows_as_they_are(self, make_onnx):
        local = local_model(str(make_onnx(shape=("B", 7))), name="m")
        rows = np.arange(21.0).reshape(3, 7)
        np.testing.assert_array_equal(local.run(rows), rows)
        np.testing.assert_array_equal(local.run(rows.astype(int)), rows)
        for bad, error in ((rows[:, :6], errors.ShapeMismatchError), (rows + 1j, errors.DtypeMismatchError)):
            with pytest.raises(error, match=r"takes"):
                local.run(bad)

    @pytest.mark.parametrize(
        ("options", "keywords", "error", "said"),
        [
            ({"shape": (1, 3, 8, 8)}, {"input_size": 8}, errors.UnsupportedError, r"fixed shape \[1, 3, 8, 8\]"),
            ({"shape": ()}, {}, errors.UnsupportedError, "fixed shape"),
            ({"kind": "INT64", "shape": ("B", 2)}, {}, errors.UnsupportedError, r"tensor\(int64\); local features are"),
            ({"kind": "STRING", "shape": ("B", 2)}, {}, errors.UnsupportedError, r"input .* is tensor\(string\)"),
            ({"shape": ("B", 8, 8, 3)}, {"input_size": 8}, errors.ShapeMismatchError, "channels first"),
            ({"shape": ("B", 3)}, {"input_size": 8}, errors.ShapeMismatchError, r"is \[3\] of float32"),
            ({"kind": "DOUBLE"}, {"input_size": 8}, errors.UnsupportedError, "float64; uint8 or float32 is needed"),
            ({"out_shape": (4, 3, 8, 8)}, {"input_size": 8}, errors.UnsupportedError, "'y' .* fixed shape"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, make_onnx, options, keywords, error, said):
        with pytest.raises(error, match=said):
            local_model(make_onnx(**options), name="m", **keywords)

    @pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (1, 2)])
    def test_several_inputs_or_outputs(self, tmp_path, inputs, outputs):
        from onnx import TensorProto

        names = ["a", "b"]
        path = onnx_file(
            tmp_path / "m.onnx",
            [("Add", [names[0], names[inputs - 1]], ["y"]), ("Neg", ["y"], ["z"])],
            [(name, TensorProto.FLOAT, ["B", 2]) for name in names[:inputs]],
            [(name, TensorProto.FLOAT, ["B", 2]) for name in ["y", "z"][:outputs]],
        )
        with pytest.raises(
            errors.UnsupportedError, match=r"2 (inputs \(a, b\)|outputs \(y, z\)); a local model has one"
        ):
            local_model(path, name="m")

    def test_files_that_are_refused(self, tmp_path, make_onnx, monkeypatch):
        import onnxruntime
        from onnx import TensorProto, helper

        monkeypatch.setattr(onnxruntime, "InferenceSession", None)  # it must not see any of these
        (tmp_path / "text.onnx").write_bytes(b"text" * 9)
        with pytest.raises(errors.CorruptDataError, match=r"text.onnx: not an ONNX file"):
            local_model(tmp_path / "text.onnx", name="m")
        foreign = helper.make_graph(
            [helper.make_node("Anything", ["x"], ["y"], domain="com.example")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2])],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
        (tmp_path / "foreign.onnx").write_bytes(helper.make_model(foreign, opset_imports=opsets).SerializeToString())
        with pytest.raises(errors.UnsupportedError, match="operators of other domains"):
            local_model(tmp_path / "foreign.onnx", name="m")
        with pytest.raises(errors.InvalidArgumentError, match="cannot be read"):
            local_model(tmp_path / "nothing.onnx", name="m")

    def test_survives_a_trip_to_another_process(self, make_onnx, images):
        local = local_model(make_onnx(), name="m", input_size=8, threads=1)
        features = local.run(images)
        again = pickle.loads(pickle.dumps(local))
        assert again.space == local.space
        np.testing.assert_array_equal(again.run(images), features)


class Net(nn.Module):
    """A small network of the tests' own."""

    def __init__(self, stride=2, scale=1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=stride)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.scale = scale

    def forward(self, x):
        return self.drop(self.norm(self.conv(x))) * self.scale


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


class TestTorch:
    def test_evaluation_mode_and_back(self, images):
        module = net()
        module.drop.eval()
        statistics = module.norm.running_mean.clone()
        local = local_model(module, name="net", input_size=8, mean=MEAN, std=STD)
        features = local.run(images)
        assert module.training and module.norm.training and not module.drop.training
        assert torch.equal(module.norm.running_mean, statistics)
        x = (pixels(images, 8).astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        with torch.no_grad():
            expected = module.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(features, expected.reshape(5, -1), atol=1e-5)

    def test_training_flag_comes_back_after_an_error(self):
        module = net()
        with pytest.raises(RuntimeError):
            local_model(module, name="net").run(np.zeros((2, 5), np.float32))
        assert module.training

    def test_rows_as_they_are_in_the_module_s_precision(self):
        module = nn.Linear(3, 2)
        rows = np.random.default_rng(0).random((4, 3))  # float64
        expected = module(torch.from_numpy(rows).float()).detach().numpy()
        np.testing.assert_allclose(local_model(module, name="l").run(rows), expected, atol=1e-6)
        half = local_model(nn.Linear(3, 2).bfloat16(), name="l").run(rows)
        assert half.dtype == np.float32 and half.shape == (4, 2)
        assert local_model(nn.Embedding(9, 2), name="e").run(np.array([[1, 2], [3, 4]])).shape == (2, 4)

    def test_several_outputs(self):
        class Two(nn.Module):
            def forward(self, x):
                return x, x

        with pytest.raises(errors.UnsupportedError, match="Two returns a tuple"):
            local_model(Two(), name="two").run(np.zeros((2, 3)))

    def test_state_that_cannot_be_hashed(self):
        class Odd(nn.Module):
            def get_extra_state(self):
                return {"anything": 1}

            def set_extra_state(self, state):
                """Nothing."""

        with pytest.raises(errors.InvalidArgumentError, match=r"'_extra_state' .* is a dict"):
            local_model(Odd(), name="odd")

    def test_what_identifies_it(self):
        def sha256(module, **keywords):
            return local_model(module, name="net", **keywords).sha256

        same = {sha256(net()), sha256(net()), sha256(net().eval())}
        assert len(same) == 1
        changed = net()
        with torch.no_grad():
            changed.norm.running_mean[0] += 1
        others = [
            sha256(net(1)),
            sha256(net(stride=1)),
            sha256(changed),
            sha256(net().double()),
            sha256(net(), version="2"),
            sha256(nn.Sequential(nn.ReLU())),
            sha256(nn.Sequential(nn.GELU())),
        ]
        assert len({*same, *others}) == 1 + len(others)

    def test_code_of_the_class_is_part_of_it(self, tmp_path):
        found = []
        for factor in (1, 2):
            path = tmp_path / f"code{factor}.py"
            path.write_text(
                f"from torch import nn\nclass N(nn.Module):\n    def forward(self, x): return x * {factor}\n"
            )
            spec = __import__("importlib.util").util.spec_from_file_location("code_of_a_test", path)
            module = __import__("importlib.util").util.module_from_spec(spec)
            sys.modules["code_of_a_test"] = module
            spec.loader.exec_module(module)
            found.append(local_model(module.N(), name="n").sha256)
        del sys.modules["code_of_a_test"]
        assert found[0] != found[1]

    def test_equal_in_another_process(self):
        code = (
            "import torch, trunkline; torch.manual_seed(0); net = torch.nn.Sequential(torch.nn.Linear(3, 2));"
            "print(trunkline.local_model(net, name='l').sha256)"
        )
        one, other = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2))
        assert one.stdout and one.stdout == other.stdout

    def test_survives_a_trip_to_another_process(self, images):
        local = local_model(net().eval(), name="net", input_size=8)
        features = local.run(images)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(local)).run(images), features)


class TestIdentity:
    def test_space(self, images):
        local = local_model(lambda x: x.mean(axis=(1, 2)), name="f", version="1", input_size=8)
        local.run(images)
        assert local.space == local_space("f", local_fingerprint(local.sha256, local.inputs, 3))
        assert local.space.is_local and local.space.source == "f"

    def test_space_is_found_with_a_blank_picture(self, images):
        local, other = (local_model(lambda x: x[..., :2], name="f", version="1", input_size=8) for _ in range(2))
        other.run(images)
        assert local.space == other.space and local.width == 8 * 8 * 2

    def test_what_tells_functions_apart(self):
        def fingerprint(name="f", version="1", rows=np.zeros((2, 8, 8, 3), np.uint8), **keywords):
            local = local_model(lambda x: x, name=name, version=version, **keywords)
            local.run(rows)
            return local.space.fingerprint

        same = [fingerprint(input_size=8), fingerprint(input_size=8, codec="float16", batch_rows=1)]
        others = [
            fingerprint(),
            fingerprint(name="g"),
            fingerprint(version="2"),
            fingerprint(input_size=4),
            fingerprint(rows=np.zeros((2, 8, 8), np.uint8)),
        ]
        assert same[0] == same[1] and len({same[0], *others}) == 6

    def test_what_tells_files_apart(self, make_onnx, images):
        def fingerprint(path, **keywords):
            local = local_model(path, name="m", **{"input_size": 8, **keywords})
            local.run(images)
            return local.space.fingerprint

        one, other = make_onnx("one.onnx"), make_onnx("other.onnx", op="Abs")
        assert fingerprint(one) == fingerprint(make_onnx("copy.onnx"))
        found = {fingerprint(one), fingerprint(other), fingerprint(one, mean=0.5), fingerprint(one, version="2")}
        assert len(found) == 4

    @pytest.mark.parametrize(
        ("keywords", "said"),
        [
            ({"version": None}, "cannot be hashed: without a version nobody could tell"),
            ({"version": 1}, "version is 1"),
            ({"version": ""}, "version is ''"),
            ({"name": "../x"}, "not a local model name"),
            ({"input_size": 0}, "input_size is 0"),
            ({"input_size": 1.5}, "input_size is 1.5"),
            ({"input_size": 5000}, "1 to 4096"),
            ({"mean": 0.5}, "without input_size"),
            ({"std": (1, 1, 1)}, "without input_size"),
            ({"input_size": 8, "mean": 0.5}, "mean and std change nothing"),
            ({"input_size": 8, "mean": (1, 2)}, "one for each of red, green and blue"),
            ({"input_size": 8, "mean": float("nan")}, "mean is nan"),
            ({"input_size": 8, "std": 0}, "above 0"),
            ({"input_size": 8, "std": "a"}, "std is 'a'"),
            ({"codec": "int8+zstd"}, "without zstd"),
            ({"batch_rows": 0}, "batch_rows is 0"),
            ({"threads": 2}, "threads is for ONNX files"),
        ],
        ids=str,
    )
    def test_what_cannot_be_asked_for(self, keywords, said):
        with pytest.raises(errors.InvalidArgumentError, match=said):
            local_model(lambda x: x, **{"name": "f", "version": "1", **keywords})

    def test_unknown_codec(self):
        with pytest.raises(errors.UnsupportedError, match="int3"):
            local_model(lambda x: x, name="f", version="1", codec="int3")

    def test_what_is_no_model(self):
        with pytest.raises(errors.InvalidArgumentError, match="a int is no local model"):
            local_model(7, name="f", version="1")


class TestFeaturesAtHand:
    def test_space(self):
        rows = np.random.default_rng(0).random((4, 3))
        one = local_features(rows, name="sensor", version="1")
        assert (len(one), one.width, one.codec, one.space.local_model) == (4, 3, "float32", "sensor")
        spaces = {
            one.space,
            local_features(rows[:, :2], name="sensor", version="1").space,
            local_features(rows, name="sensor", version="2").space,
            local_features(rows, name="other", version="1").space,
        }
        assert len(spaces) == 4
        assert local_features(rows[:2], name="sensor", version="1", codec="int8").space == one.space

    def test_whole_numbers_and_tables(self):
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame({"a": [1, 2], "b": [3, 4]})
        features = local_features(table, name="t", version="1").features
        assert features.take([1]).tolist() == [[2.0, 4.0]] and features.take([1]).dtype == np.float32

    @pytest.mark.parametrize(
        ("rows", "error"),
        [
            (np.zeros(3), errors.ShapeMismatchError),
            (np.zeros((2, 2, 2)), errors.ShapeMismatchError),
            (np.zeros((2, 0)), errors.ShapeMismatchError),
            (np.zeros((0, 2)), errors.EmptyBatchError),
            (np.array([[1.0], [np.nan]]), errors.NotFiniteError),
            (np.array([["a"]]), errors.DtypeMismatchError),
        ],
        ids=str,
    )
    def test_what_are_none(self, rows, error):
        with pytest.raises(error):
            local_features(rows, name="s", version="1")

    @pytest.mark.parametrize("keywords", [{"version": ""}, {"name": "a b"}, {"codec": "float16+zstd"}], ids=str)
    def test_what_cannot_be_asked_for(self, keywords):
        with pytest.raises(errors.InvalidArgumentError):
            local_features(np.zeros((2, 2)), **{"name": "s", "version": "1", **keywords})


def test_torch_and_onnxruntime_are_not_loaded_for_a_function():
    code = (
        "import sys, numpy, trunkline; trunkline.local_model(lambda x: x, name='f', version='1').run(numpy.ones(2));"
        "print({'torch', 'onnxruntime', 'PIL'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
