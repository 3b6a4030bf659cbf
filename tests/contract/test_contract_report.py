"""Reports and cards of models that a server trained, whatever it keeps of the training."""

import json

import pytest
from PIL import Image
from trunkline.cli.app import app
from typer.testing import CliRunner

SECTIONS = (
    "summary",
    "data",
    "curves",
    "search",
    "confusion",
    "calibration",
    "classes",
    "mistakes",
    "suspects",
    "again",
)


def test_report_and_card(client, server, pictures, unique, tmp_path):
    images, labels = pictures(40)
    stem = client.stem(server.backbone, cut=server.cut, input_size=server.input_size, threads=1)
    data = client.upload(images, labels, name=unique("data"), stem=stem)
    model = client.train(data, name=unique("m"), seed=3).result(120)
    path = model.report(tmp_path / "report.html", images=images)
    page = path.read_text(encoding="utf-8")
    for name in SECTIONS:
        assert f'<section id="{name}">' in page
    assert page.count("<section") == page.count("</section>") == len(SECTIONS) + 1
    assert model.reference in page and data.reference in page and model.record.dataset_digest in page
    kept = client._calls.registry.evaluation(model.reference, client._deadline(None)) if server.fake is None else None
    assert ("keeps no answers" in page) == (kept is None)
    assert ("data:image/jpeg;base64," in page) == (kept is not None)
    card = model.card(tmp_path / "card.md")
    assert card.startswith('---\nlibrary_name: "trunkline"\n') and f'model("{model.reference}")' in card
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == card


@pytest.fixture
def run(fake, monkeypatch, tmp_path):
    """Run a command as a logged-in user, in a folder that has a model."""
    monkeypatch.setenv("TRUNKLINE_ADDRESS", fake.address)
    monkeypatch.setenv("TRUNKLINE_TOKEN", fake.token)
    monkeypatch.chdir(tmp_path)
    for row in range(12):
        place = tmp_path / "photos" / "abc"[row % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), [(200, 0, 0), (0, 200, 0), (0, 0, 200)][row % 3]).save(place / f"{row:02}.png")

    def invoke(*words):
        return CliRunner().invoke(app, [str(one) for one in words])

    assert invoke("upload", "photos", tmp_path / "photos").exit_code == 0
    assert invoke("train", "photos", "--name", "m").exit_code == 0
    return invoke


def test_command(run, tmp_path):
    found = run("report", "m", "--images", tmp_path / "photos", "--card", "card.md")
    assert found.exit_code == 0 and found.stdout == "m-1.html\ncard.md\n" and found.stderr == ""
    assert "m@1" in (tmp_path / "m-1.html").read_text() and "library_name" in (tmp_path / "card.md").read_text()
    data = json.loads(run("report", "m@1", "--output", "again.html", "--json").stdout)
    assert data == {"model": "m@1", "report": "again.html", "card": None}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("report", "nobody"), 1, "next:  trunkline models"),
        (("report", "m", "--output", "no/such/folder.html"), 2, "trunkline report --help"),
        (("report", "m", "--output", "photos"), 2, "is a folder"),
        (("report", "m", "--images", "nowhere"), 2, "is not there"),
        (("report",), 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_exit_codes(run, words, code, said):
    found = run(*words)
    assert found.exit_code == code, found.output
    assert said in found.stderr and found.stdout == ""
