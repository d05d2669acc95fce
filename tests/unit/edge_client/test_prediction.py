"""Classifying files: their order, and those that cannot be read."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from edge_client.data.image_files import image_files
from edge_client.data.image_set import decode_file
from edge_client.model import preprocessing_of
from edge_client.prediction import Prediction, Predictor
from edge_client.prediction_output import write_csv
from edge_client.whole_prediction import WholePredictor
from protocol.errors import InvalidField, NotFound
from protocol.messages import BlobRef, JoinRequest, JoinResponse, RunStatus, RunView
from protocol.plan import ModelPlan, RunPlan
from split_model.backbone.weights import open_backbone, prepare_backbone
from split_model.checkpoints.export import export_model, load_exported
from split_model.checkpoints.metadata import image_preparation
from split_model.checkpoints.state import initial_state
from tests.support.edge import SMALL, BodyServer, device_model, files, image_set
from tuning_methods.custom.settings import Custom


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    images, paths = image_set(count), []
    for number in range(count):
        pixels = images.store.read(number).transpose(1, 2, 0)
        paths.append(folder / f"{number:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


# Which files


def test_folders_are_searched_and_sorted_and_files_taken_as_given(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "a", 3)
    (tmp_path / "a" / "deep").mkdir()
    nested = save_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b.weird").write_text("named by hand")
    (tmp_path / "a" / "UPPER.PNG").write_bytes(paths[0].read_bytes())
    listed, skipped = image_files([tmp_path / "b.weird", tmp_path / "a", paths[1]])
    upper = tmp_path / "a" / "UPPER.PNG"
    assert listed == [tmp_path / "b.weird", *paths, upper, *nested, paths[1]]
    assert [entry.path for entry in skipped] == [str(tmp_path / "a" / "notes.txt")]


def test_a_path_that_does_not_exist_is_named_and_the_others_are_classified(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "a", 1)
    listed, skipped = image_files([tmp_path / "absent.png", *paths])
    assert listed == paths
    assert [entry.reason for entry in skipped] == ["no such file or folder"]


def test_predictions_as_csv_have_a_row_for_each_image() -> None:
    written = io.StringIO()
    predictions = [
        Prediction("a, b.png", (("=cat", 0.75), ("dog", 0.25))),
        Prediction("broken.png", error="not an image"),
        Prediction("c.png", (("dog", 1.0),)),  # fewer classes than asked for
    ]
    write_csv(predictions, 2, written)
    rows = list(csv.reader(io.StringIO(written.getvalue())))
    assert rows == [
        ["image", "class1", "probability1", "class2", "probability2", "error"],
        ["a, b.png", "'=cat", "0.750000", "dog", "0.250000", ""],
        ["broken.png", "", "", "", "", "not an image"],
        ["c.png", "dog", "1.000000", "", "", ""],
    ]


def test_nothing_to_classify(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file") as caught:
        image_files([tmp_path / "absent"])
    assert caught.value.value == [str(tmp_path / "absent")]
    with pytest.raises(NotFound, match="no image"):
        image_files([tmp_path])


# Predictions


class Host(BodyServer):
    """A finished run to predict with."""

    def view(self, names: tuple[str, ...] | None) -> RunView:
        run_files = files()
        return RunView(
            id="r",
            status=RunStatus.FINISHED,
            settings=Custom.of(RunPlan(model=SMALL, class_names=names)),
            plan=RunPlan(model=SMALL, class_names=names),
            round=3,
            participants=1,
            created_at=0,
            backbone_bytes=1,
            head=run_files.ref(run_files.head),
            state=run_files.ref(run_files.state),
        )

    def join(self, run: str, request: JoinRequest, key: str, token: str | None) -> JoinResponse:
        self.request, self.key = request, key
        return JoinResponse(participant="p", credential="c", run=self.run_view)

    def authenticate(self, credential: str) -> None:
        self.credential = credential

    def head(self, run: str, start: int) -> bytes:
        return files().head.read_bytes()[start:]

    def state(self, run: str, ref: BlobRef, start: int) -> bytes:
        return files().state.read_bytes()[start:]


def predictor(folder: Path, names: tuple[str, ...] | None = ("r", "g", "b")) -> Predictor:
    server = Host()
    server.run_view = server.view(names)
    joined = Predictor.join(server, server.run_view, folder, "key", "me (predict)")
    assert (server.request.train_samples, server.request.test_samples) == (0, 0)
    assert server.credential == "c"
    return joined


def test_every_file_in_order_with_the_unreadable_named(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 40)  # more than one batch
    broken = {paths[i] for i in (0, 7, 31, 32, 39)}
    for path in broken:
        path.write_bytes(path.read_bytes()[:50])
    predictions = list(predictor(tmp_path / "blobs").predict(paths, top=2))
    assert [prediction.path for prediction in predictions] == [str(path) for path in paths]

    model, body = device_model(), BodyServer()
    for path, prediction in zip(paths, predictions, strict=True):
        if path in broken:
            assert prediction.classes == ()
            assert "not an image" in prediction.error or "cannot be decoded" in prediction.error
            assert prediction.to_dict() == {"path": str(path), "error": prediction.error}
            continue
        preprocessing = model.preprocessing
        pixels = preprocessing.normalise(preprocessing.resize(decode_file(path))[None])
        with torch.no_grad():
            smashed = model.head(torch.from_numpy(pixels), model.prompts)
            features = body.infer(smashed, step="", round_=0)
            shares = model.tail(features).softmax(dim=1)[0]
        order = shares.argsort(descending=True)[:2].tolist()
        assert prediction.error is None
        assert [name for name, _ in prediction.classes] == ["rgb"[i] for i in order]
        assert [share for _, share in prediction.classes] == pytest.approx(
            [float(shares[i]) for i in order], abs=1e-5
        )


def export(folder: Path, split: ModelPlan = SMALL, names: tuple[str, ...] | None = None) -> Path:
    backbone = prepare_backbone(split, split.weights, folder / "backbones").path
    state = initial_state(split, open_backbone(backbone), seed=3)
    return export_model(split, backbone, state, folder / "m.safetensors", class_names=names)


def test_an_exported_file_says_how_images_are_fitted(tmp_path: Path) -> None:
    predictor = WholePredictor(export(tmp_path, SMALL.replace(fit="pad", background="#102030")))
    preprocessing = predictor.preprocessing
    assert (preprocessing.fit, preprocessing.background) == ("pad", (16, 32, 48))
    assert WholePredictor(export(tmp_path)).preprocessing.fit == "crop"


def test_a_turned_and_a_transparent_picture_predict_as_what_people_see(tmp_path: Path) -> None:
    (path,) = save_images(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "turned.png", exif=exif)
        clear = image.convert("RGBA")
    clear.putpixel((3, 3), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    flat = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    flat.convert("RGB").save(tmp_path / "flat.png")
    pairs = [(path, tmp_path / "turned.png"), (tmp_path / "flat.png", tmp_path / "clear.png")]
    model = WholePredictor(export(tmp_path))
    for upright, other in pairs:
        one, two = model.predict([upright, other], top=3)
        assert one.classes == two.classes


@pytest.mark.parametrize("names", [("r", "g", "b"), None])
def test_an_exported_model_predicts_as_for_the_same_pixels(
    tmp_path: Path, names: tuple[str, ...] | None
) -> None:
    paths = save_images(tmp_path / "images", 3)
    paths[1].write_bytes(b"no image")
    split = SMALL
    file = export(tmp_path, split, names)
    predictions = list(WholePredictor(file).predict(paths, top=3))
    assert predictions[1].error is not None
    model, preprocessing = load_exported(file), preprocessing_of(split, image_preparation(split))
    for number in (0, 2):
        pixels = preprocessing.resize(decode_file(paths[number]))[None]
        shares = model(torch.from_numpy(preprocessing.normalise(pixels))).softmax(dim=1)[0]
        expected = {(names or "012")[i]: pytest.approx(float(shares[i])) for i in range(3)}
        assert dict(predictions[number].classes) == expected


def test_a_file_that_is_no_exported_model_is_refused_by_name(tmp_path: Path) -> None:
    for content in (None, b"no safetensors"):
        file = tmp_path / "model.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidField) as caught:
            WholePredictor(file)
        assert (caught.value.field, caught.value.value) == ("model", str(file))
        assert "split-server export" in str(caught.value)


def test_a_batch_of_unreadable_files_sends_no_request(tmp_path: Path) -> None:
    bad = [tmp_path / f"{number}.png" for number in range(3)]
    for path in bad:
        path.write_bytes(b"no image")
    joined = predictor(tmp_path / "blobs")
    assert all(prediction.error for prediction in joined.predict(bad, top=1))
    assert joined._server.calls == []


def test_classes_without_names_are_numbers_and_never_more_than_there_are(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 1)
    (prediction,) = predictor(tmp_path / "blobs", names=None).predict(paths, top=9)
    assert {name for name, _ in prediction.classes} == {"0", "1", "2"}
    assert sum(share for _, share in prediction.classes) == pytest.approx(1)
    assert Prediction("x", (("0", 0.5),)).to_dict() == {"path": "x", "classes": {"0": 0.5}}


def test_gradients_are_off_while_predicting_and_on_again_after(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 2)
    for _ in predictor(tmp_path / "blobs").predict(paths, top=1):
        assert torch.is_grad_enabled()
