"""The table of what cuts cost, and how fast stems run: without a server."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from trunkline import errors
from trunkline._bench import generated_pictures, measure_codecs, measure_speed
from trunkline._cut_table import cut_row, judge
from trunkline._jpeg import JpegSize, measure_jpeg, spread
from trunkline.cli import cuts as command
from trunkline.stems import RUN_ROWS, Stem
from trunkline_wire.limits import MAX_PAYLOAD_BYTES
from trunkline_wire.quantise import CODECS, ZSTD, row_bytes
from trunkline_wire.specs import (
    BackboneSpec,
    CodecCost,
    CutCost,
    CutSpec,
    FeatureSpace,
    Preprocessing,
    SliceSpec,
    StemCost,
)

PREPROCESSING = Preprocessing(16, 1.0, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ERRORS = {"float32": 0.0, "float16": 1e-4, "bfloat16": 2e-3, "int8": 0.01, "int4": 0.2}


def cut(name, shape, macs, parameters, is_stage=True):
    return CutSpec(name, shape, "ab" * 32, ("pooled",), 0, is_stage, macs, parameters, "cd" * 32)


def backbone(prefix=""):
    """Describe a network of which the first cut is larger than a JPEG, the second depends on the codec."""
    return BackboneSpec(
        name="net",
        pretrained=True,
        weights="somewhere",
        weights_sha256="00",
        num_parameters=1000,
        preprocessing=PREPROCESSING,
        resizable=True,
        cuts=(
            CutSpec("input", (16, 16, 3), "ef" * 32, ("pooled",), 2),
            cut(f"{prefix}early", (64, 8, 8), 1, 10),
            cut(f"{prefix}middle", (16, 8, 8), 500, 500_000),
            cut(f"{prefix}late", (256,), 996, 900_000, False),
        ),
        slices=(SliceSpec("middle.mean", 0, 16), SliceSpec("pooled", 16, 272)),
        embedding_fingerprint="00",
        macs=1000,
    )


def measured(one, jpeg=1000.0):
    """Say what a cut costs; zstd halves every size."""
    codecs = [
        CodecCost(codec + suffix, row_bytes(one.feature_shape, codec) / (2 if suffix else 1), ERRORS[codec])
        for codec in CODECS
        for suffix in ("", ZSTD)
    ]
    stems = (StemCost("float32", 12345, 0.0), StemCost("int8", 4000, 0.045))
    return CutCost(one, tuple(codecs), stems, jpeg, "6 pictures made up")


def row(name, jpeg=1000.0, with_cost=False, max_error=0.05):
    spec = backbone()
    one = spec.cut(name)
    size = None if jpeg is None else JpegSize(jpeg, None, "made up")
    return cut_row(spec, one, cost=measured(one) if with_cost else None, jpeg=size, max_error=max_error)


class TestRows:
    def test_before_anything_is_measured(self):
        early, middle, late = row("early"), row("middle"), row("late")
        assert (early.beats_jpeg, middle.beats_jpeg, late.beats_jpeg) == ("", "int4", "float16")
        assert (early.jpeg_is_better, middle.jpeg_is_better, late.jpeg_is_better) == (True, False, False)
        assert dict(middle.sizes)["int8"] == 16 * 64 + 8 * 16 and dict(late.sizes)["int4"] == 128 + 8
        assert middle.smallest is None and middle.local_share == 0.5 and middle.stem_bytes == 2_000_000

    def test_measured(self):
        # int4 is over the bound, and zstd brings int8 below the JPEG.
        middle = row("middle", with_cost=True)
        assert middle.smallest.codec == "int8+zstd" and middle.jpeg_is_better is False
        assert row("early", with_cost=True).jpeg_is_better is True
        assert row("middle", with_cost=True, max_error=0.3).smallest.codec == "int4+zstd"
        assert row("middle", with_cost=True, max_error=1e-3).jpeg_is_better is True
        assert middle.stem_bytes == 12345

    def test_nothing_to_compare_with(self):
        assert row("middle", jpeg=None).jpeg_is_better is None and row("middle", jpeg=None).beats_jpeg is None
        assert row("input").jpeg_is_better is None and row("input").sizes == ()

    def test_verdict(self):
        verdict = judge([row("input"), row("early"), row("middle", with_cost=True), row("late")])
        assert verdict.best[0].cut.name == "middle" and verdict.best[1].codec == "int8+zstd"
        assert (verdict.estimate[0].cut.name, *verdict.estimate[1:]) == ("late", "int4", 136)
        assert (verdict.worse_than_jpeg, verdict.worse_before_zstd) == ((), ("early",))
        assert judge([row("early", with_cost=True)]).worse_than_jpeg == ("early",)

    def test_plain_values(self):
        one = cut_row(
            backbone(),
            backbone().cut("middle"),
            cost=CutCost(
                backbone().cut("middle"), (CodecCost("float16", 9, float("inf")),), (StemCost("float32", 1, 0),), 1, ""
            ),
            jpeg=None,
            max_error=0.05,
        )
        codecs = {one["codec"]: one for one in json.loads(json.dumps(one.to_dict(), allow_nan=False))["codecs"]}
        assert codecs["float16"] == {
            "codec": "float16",
            "bytes_per_row": 9,
            "embedding_error": None,
            "is_allowed": False,
        }
        assert codecs["int8"]["is_allowed"] is None and one.smallest is None


class Client:
    """Answers as a cluster would."""

    def __init__(self, spec, knows_costs=True):
        self.spec = spec
        self.knows_costs = knows_costs
        self.asked = []

    def describe(self, name, *, input_size=None):
        return self.spec

    def cut_cost(self, name, cut, *, input_size=None):
        if not self.knows_costs:
            raise errors.UnsupportedError("too old")
        self.asked.append(cut)
        return measured(self.spec.cut(cut))


def show(client, **keywords):
    defaults = {"every": False, "cuts": (), "measure": False, "images": None, "max_error": None}
    return command.show(client, "net", None, **{**defaults, **keywords})


class TestText:
    def test_stages(self):
        client = Client(backbone())
        data, text, following = show(client)
        lines = {line.split()[0]: line for line in text.splitlines() if line}
        assert lines["early"].endswith("send the JPEG") and lines["middle"].endswith("int4") and "late" not in lines
        assert "there the JPEG is smaller than every codec before zstd" in text
        assert "2 of 3 cuts are shown" in text and following == "trunkline backbones show net --cut middle"
        assert [one["name"] for one in data["table"]] == ["input", "early", "middle"]
        assert client.asked == ["input"] and json.dumps(data, allow_nan=False)

    def test_every_cut(self):
        _, text, _ = show(Client(backbone()), every=True)
        assert "late" in text and "cuts are shown" not in text
        assert ">99%" in text and "<1%" in text

    def test_cuts_by_name_are_measured(self):
        client = Client(backbone())
        _, text, following = show(client, cuts=["middle"])
        assert client.asked == ["input", "middle"]
        assert "middle, measured on 6 pictures made up" in text and "over 0.05 with the int8 stem" in text
        assert "Fewest bytes within the error bound 0.05: middle as int8+zstd, 0.58 kB, error 0.01." in text
        assert following == "trunkline upload NAME FOLDER --stem net:middle --codec int8+zstd"

    def test_pictures_where_they_are_smaller(self):
        _, text, following = show(Client(backbone()), cuts=["early"])
        assert "there the JPEG is smaller than every codec within the error bound 0.05" in text
        assert "the JPEG needs fewer." in text and following == "trunkline upload NAME FOLDER"

    def test_no_codec_within_the_bound(self):
        client = Client(backbone())
        client.cut_cost = lambda name, cut, *, input_size=None: CutCost(
            backbone().cut(cut), (CodecCost("int4", 1.0, 0.2),), (), 1000.0, "made up"
        )
        assert "No codec keeps within the error bound 0.05 at middle." in show(client, cuts=["middle"])[1]

    def test_cluster_too_old_to_know(self):
        data, text, _ = show(Client(backbone(), knows_costs=False))
        assert data["jpeg"] is None and "--images FOLDER measures yours" in text and "JPEG is smaller" not in text

    def test_pictures_of_the_user(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3)).astype(np.uint8)
        for number, one in enumerate(noise):
            Image.fromarray(one).save(tmp_path / f"{number}.jpg", quality=95)
        data, text, _ = show(Client(backbone()), images=tmp_path)
        own = sum(one.stat().st_size for one in tmp_path.iterdir()) / 3
        assert data["jpeg"]["own"] == own and data["jpeg"]["resized"] < own
        assert f"{own / 1e3:.1f} kB as the files are, means of 3 pictures" in text

    @pytest.mark.parametrize(
        "prefix", ["", "stages.3.blocks.11.", "features.denseblock3.denselayer24.sub.module.name."]
    )
    @pytest.mark.parametrize("keywords", [{}, {"every": True}, {"every": True, "measure": True}], ids=str)
    def test_fits_a_terminal(self, prefix, keywords):
        _, text, _ = show(Client(backbone(prefix)), **keywords)
        assert max(map(len, text.splitlines())) <= 120
        assert all(f"{prefix}{name}" in text for name in ("early", "middle"))


class TestJpeg:
    def test_sizes(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        found = measure_jpeg([buffer.getvalue()] * 3, PREPROCESSING)
        again = io.BytesIO()
        picture.resize((16, 16), Image.Resampling.BILINEAR).save(again, "JPEG", quality=90)
        assert found.own == buffer.tell() and found.resized == pytest.approx(again.tell(), rel=0.1)
        assert found.smallest == found.resized and found.source == "3 pictures"

    def test_own_files_may_be_smaller(self):
        assert JpegSize(100.0, 60.0, "").smallest == 60.0

    def test_many_are_sampled(self):
        assert spread(range(1000), 4) == [0, 250, 500, 750]
        assert spread(range(3), 4) == [0, 1, 2]


@pytest.fixture(scope="module")
def stem_data():
    """Export uint8 (B, 16, 16, 3) to float32 (B, 3, 16, 16)."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["features"], perm=[0, 3, 1, 2]),
        ],
        "stem",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 16, 16, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", 3, 16, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


class TestBench:
    @pytest.fixture
    def stem(self, stem_data):
        space = FeatureSpace("net", "middle", 16, "ab" * 32)
        return Stem(stem_data, space, PREPROCESSING, (3, 16, 16), codec="float32", threads=1)

    def test_speed(self, stem, monkeypatch):
        runs = []
        whole = Stem.run_pixels
        monkeypatch.setattr(Stem, "run_pixels", lambda self, x: runs.append(len(x)) or whole(self, x))
        speed = measure_speed(stem, generated_pictures(2), 0.0)
        # The first call, then one for each rate.
        assert runs == [RUN_ROWS] * 3
        assert (speed.precision, speed.threads, speed.size_bytes) == ("float32", 1, stem.size_bytes)
        assert min(speed.images_per_s, speed.decoded_images_per_s, speed.load_s, speed.first_s) > 0

    def test_bytes_of_each_codec(self, stem):
        sizes = measure_codecs(stem, generated_pictures(4))
        assert set(sizes) == {codec + suffix for codec in CODECS for suffix in ("", ZSTD)}
        for codec in CODECS:
            assert sizes[codec] == row_bytes((3, 16, 16), codec) >= sizes[codec + ZSTD]

    def test_rows_of_an_early_cut_are_measured_by_as_many_as_fit_a_message(self, stem, monkeypatch):
        wide = (3, 512, 512)
        monkeypatch.setattr(stem, "feature_shape", wide)
        taken = []

        def run(self, rows):
            taken.append(len(rows))
            return np.zeros((len(rows), *wide), np.float32)

        monkeypatch.setattr(Stem, "run", run)
        sizes = measure_codecs(stem, generated_pictures(RUN_ROWS))
        assert taken[0] * row_bytes(wide, "float32") <= MAX_PAYLOAD_BYTES < RUN_ROWS * row_bytes(wide, "float32")
        assert sizes["float32"] == row_bytes(wide, "float32")

    def test_codec_that_cannot_hold_the_features(self, stem, monkeypatch):
        whole = Stem.run
        monkeypatch.setattr(Stem, "run", lambda self, rows: whole(self, rows) * np.float32(1e6))
        sizes = measure_codecs(stem, generated_pictures(1))
        assert sizes["float16"] is None and sizes["float16+zstd"] is None and sizes["bfloat16"] > 0

    def test_generated_pictures_are_files_and_the_same_each_time(self):
        one, other = generated_pictures(2), generated_pictures(2)
        assert [row.encoded() for row in one] == [row.encoded() for row in other]
        assert one[0].encoded()[:3] == b"\xff\xd8\xff" and one[0].encoded() != one[1].encoded()
