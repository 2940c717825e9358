"""The page of generated images, from a folder that was written by hand."""

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from forebear import report
from forebear.errors import FormatError
from forebear.gallery import Asked, Effect, Familiar, Gallery, Listed, Mapped, Pictured, Regenerated
from forebear.report import heat, image_words, meanings
from forebear.run import IMAGES, DatasetFacts, MethodResult, Run
from tests.page_elements import Elements

HOSTILE = "<script><b>&.png"


def drawn(folder: Path, name: str, size: int = 8, mode: str = "L") -> str:
    """A picture file with pixels of its own."""
    random = np.random.default_rng(len(name) + sum(map(ord, name)))
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = random.integers(0, 255, shape).astype(np.uint8)
    pixels[0] = pixels[-1] = pixels[:, 0] = pixels[:, -1] = 0
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    file = f"pictures/{name}.png"
    Image.fromarray(pixels).save(folder / file)
    return file


def asked(folder: Path, number: int) -> Asked:
    """One generated image about which everything was found."""
    here = np.zeros((2, 8, 8), dtype=np.float32)
    here[0, :3], here[1, 5:] = 1.0, 0.25
    entropy = np.full((8, 8), np.log(2.0), dtype=np.float32)
    entropy[0] = np.log(40.0)
    file = f"maps/{number}.safetensors"
    (folder / "maps").mkdir(exist_ok=True)
    save_file({"here": here, "there": here[:, ::-1].copy(), "entropy": entropy}, folder / file)
    again = [drawn(folder, f"again-{number}-{part}") for part in ("a", "b", "c")]
    return Asked(
        image=Pictured(id=str(number), picture=drawn(folder, f"generated-{number}")),
        lists=[
            Listed(method="das", images=[0, 1], scores=[4.0, 1.0]),
            Listed(method="nda", images=[1, 2], scores=[2.0, 0.0]),
            Listed(method="pixels", images=[1, 3], scores=[-1.0, -2.0]),
        ],
        concepts=[Listed(method="concept_trak", images=[3], scores=[1.0], about="a boot")],
        maps=Mapped(file=file, images=[1, 2]),
        again=Regenerated(
            everything=again[0],
            without=again[1],
            random=[again[2]],
            moved=3.0,
            moved_random=[1.0],
            likeness=0.5,
            likeness_random=[0.9],
        ),
    )


def write_folder(folder: Path) -> Gallery:
    names = ["animals/cat.png", HOSTILE, "dog.png", "sea.png"]
    gallery = Gallery(
        asked=[asked(folder, 0), asked(folder, 1)],
        train=[Pictured(id=n, picture=drawn(folder, f"train-{i}")) for i, n in enumerate(names)],
        side=[8, 8],
        effect=Effect(method="das", count=5, ratio=3.0, p=0.004, models=5, images=2),
    )
    gallery.save(folder)
    methods = {"das": "DAS", "nda": "NDA", "pixels": "Pixel distance"}
    Run(
        kind=IMAGES,
        title="Two pictures",
        dataset=DatasetFacts(name="files", train=100, queries=2),
        methods=[MethodResult(name=n, label=label, seconds=1.0) for n, label in methods.items()],
        best="das",
    ).save(folder)
    return gallery


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("generated")
    write_folder(where)
    assert report.write(where) == where / "report.html"
    return where


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_and_every_picture_has_words(page: str) -> None:
    for tag, attrs in Elements(page).tags:
        assert tag not in ("link", "iframe", "object")
        assert not (attrs.get("href") or "#").startswith(("http", "//"))
        if tag == "img":
            assert (attrs["src"] or "").startswith("data:image/")
            assert "alt" in attrs
    bare = [a for t, a in Elements(page).tags if t == "img" and not a["alt"]]
    assert all("over" in (a["class"] or "") or a["class"] == "picture " for a in bare)
    assert len(page.encode()) < 1_000_000


def test_rows_hold_the_files_by_name_in_the_order_of_the_method(page: str) -> None:
    rows = re.findall(r'<div class="row.*?</ol>', page, re.S)
    names = [re.findall(r'data-image="(\d)"', row) for row in rows[:4]]
    assert names == [["0", "1"], ["1", "2"], ["1", "3"], ["3"]]
    text = Elements(page).text
    for part in ("cat.png", HOSTILE, "As far as it is a boot", "Picture 1", "Picture 2"):
        assert part in text
    assert "<b>&.png" not in page
    assert 'title="animals/cat.png, score 4"' in page


def test_images_that_several_methods_name_are_marked_and_likeness_is_counted_apart(
    page: str,
) -> None:
    first = page.split("<article")[1]
    marked = re.findall(r'<li class="one([^"]*)" data-image="(\d)"', first)[:6]
    assert marked == [
        ("", "0"),
        (" shared alike", "1"),
        (" shared alike", "1"),
        ("", "2"),
        ("", "1"),
        ("", "3"),
    ]
    assert first.count('title="2 methods name it"') == 2
    text = Elements(page).text
    assert "DAS and NDA name 3 training images, 1 of them by both." in text
    assert "1 of the 3 also stands in a row to compare with." in text
    assert "ways to estimate it, and 1 by likeness alone to compare with" in text


def test_what_only_looks_alike_agrees_with_nobody(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    pixels = gallery.asked[0].lists[2]
    alone = replace(gallery.asked[0], lists=[pixels, replace(pixels, method="similarity")])
    run = Run.load(tmp_path)
    assert image_words.named_by(alone) == {}
    assert image_words.agreement(run, alone) == ""
    assert image_words.looking_alike(alone) == {1, 3}


def test_a_model_that_knows_nothing_or_its_pictures_badly_is_said_to(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    fine = Familiar(losses=[0.1, 0.2], median=0.1, largest=0.25, among=100, share=0.4)
    for known, said, panels in (
        (fine, "", 0),
        (replace(fine, losses=[0.26, 0.2]), "finds 1 of 2 pictures stranger than any of", 1),
        (replace(fine, losses=[0.9, 0.8]), "finds all 2 pictures stranger than any of the 100", 2),
        (replace(fine, share=0.9), "little better than one that knows their average", 0),
        (replace(fine, share=1.1), "no better than one that knows their average", 0),
        (None, "", 0),
    ):
        replace(gallery, familiar=known).save(tmp_path)
        text = Elements(report.write(tmp_path).read_text()).text
        assert ("Read with care." in text) == bool(said)
        assert said in text
        assert text.count("Strange to the model itself") == panels


def test_a_page_of_noise_does_not_begin_with_a_finding(tmp_path: Path) -> None:
    gallery = replace(write_folder(tmp_path), effect=None)
    run = Run.load(tmp_path)
    fine = Familiar(losses=[0.1, 0.2], median=0.1, largest=0.25, among=100, share=0.4)
    for known, said in (
        (fine, "most likely behind them"),
        (replace(fine, losses=[0.9, 0.1]), "most likely behind them"),
        (replace(fine, losses=[0.9, 0.9]), "strange to the very model that made them"),
        (replace(fine, share=0.9), "by a model that has hardly learned yet"),
    ):
        assert said in image_words.title(run, replace(gallery, familiar=known))


def test_a_loss_above_all_but_near_the_median_is_not_strange(tmp_path: Path) -> None:
    close = Familiar(losses=[1.2, 1.6], median=1.0, largest=1.1, among=100)
    gallery = replace(write_folder(tmp_path), familiar=close)
    assert [image_words.strange(gallery, i) for i in range(3)] == [False, True, False]


def test_bars_are_shares_of_the_largest_score_or_the_smallest_distance(page: str) -> None:
    rows = re.findall(r'<div class="row.*?</ol>', page, re.S)
    widths = [re.findall(r"width:(\d+)%", row) for row in rows[:3]]
    assert widths == [["100", "25"], ["100", "0"], ["100", "50"]]


def test_the_maps_of_the_first_picture_are_open(page: str) -> None:
    assert re.findall(r"<details[^>]*>", page)[:2] == [
        '<details class="part places" open>',
        '<details class="part places">',
    ]
    text = Elements(page).text
    assert "The rarest part of this picture fits about 2 training images, the most common" in text
    assert "such as plain background, 40 training images." in text
    assert "fits 40" in text


def test_what_removal_did_is_said_with_its_chance(page: str) -> None:
    text = Elements(page).text
    for part in (
        "Without the training images that DAS names first, a picture changes 3.0 times as much",
        "The list of DAS was checked by training again without its first 5 images; the other",
        "Without the 5 that DAS names first, it changes 3.0 times as much as without 5 random ones",
        "about 1 of 250 such trials (p = 0.004)",
        "3.00 without the strongest, 1.00 without random ones; structural similarity 0.50 and 0.90",
        "Influence is not copying",
    ):
        assert part in text


def test_a_removal_that_proves_nothing_is_not_dressed_up(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    assert gallery.effect is not None
    for effect, said in (
        (replace(gallery.effect, p=0.4, ratio=1.1), "no more than chance may do (p = 0.40)"),
        (replace(gallery.effect, p=None, images=1), "One image says little"),
        (replace(gallery.effect, p=0.99, ratio=0.8), "take this ranking with care"),
    ):
        replace(gallery, effect=effect).save(tmp_path)
        text = Elements(report.write(tmp_path).read_text()).text
        assert said in text
        assert "and which of 100 training images are most likely behind them." in text


def test_what_was_not_made_is_left_out(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    bare = [replace(one, concepts=[], maps=None, again=None) for one in gallery.asked]
    replace(gallery, asked=bare, effect=None).save(tmp_path)
    elements = Elements(report.write(tmp_path).read_text())
    assert "removal" not in elements.ids()
    for part in ("Which part fits which", "had never been there", "One thing in the picture"):
        assert part not in elements.text
    assert "None of it was checked: that takes training the model again" in elements.text
    assert "none of these was tested" in elements.text


def test_pictures_are_counted_unless_they_have_words_or_names(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    first, *rest = gallery.asked
    for name, caption, said in (
        ("7", "", "Picture 1"),
        ("key 7", "", "Picture 1"),
        ("sets/boot.png", "", "boot.png"),
        ("key 7", "a boot", "a boot"),
    ):
        image = replace(first.image, id=name, caption=caption)
        replace(gallery, asked=[replace(first, image=image), *rest]).save(tmp_path)
        html = report.write(tmp_path).read_text()
        assert f'aria-label="{said}"' in html


@pytest.mark.parametrize(
    ("mode", "look"), [("L", "generated small ink"), ("RGB", "generated small")]
)
def test_bright_strokes_on_black_are_inverted_and_colours_never(
    mode: str, look: str, tmp_path: Path
) -> None:
    gallery = write_folder(tmp_path)
    for i in range(4):
        drawn(tmp_path, f"train-{i}", mode=mode)
    gallery.save(tmp_path)
    page = report.write(tmp_path).read_text()
    assert f'<body class="{look}">' in page


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    gallery = write_folder(tmp_path)
    (tmp_path / "pictures/train-2.png").unlink()
    with pytest.raises(FormatError, match=r"no picture 'pictures/train-2\.png'"):
        report.write(tmp_path)
    stray = replace(gallery.train[0], picture="../run.json")
    replace(gallery, train=[stray, *gallery.train[1:]]).save(tmp_path)
    with pytest.raises(FormatError, match=r"no picture '\.\./run\.json'"):
        report.write(tmp_path)
    (tmp_path / "gallery.json").write_text('{"asked": 3}')
    with pytest.raises(FormatError, match="asked is damaged"):
        report.write(tmp_path)
    (tmp_path / "gallery.json").unlink()
    with pytest.raises(FormatError, match=r"has no gallery\.json"):
        report.write(tmp_path)


def test_a_map_is_clear_where_nothing_matters_and_keeps_its_order() -> None:
    uri = heat.overlay(np.array([[0.0, 0.25], [0.5, 1.0]]), 1.0)
    content = base64.b64decode(uri.partition(",")[2])
    opacity = np.asarray(Image.open(io.BytesIO(content)))[..., 3]
    assert opacity[0, 0] == 0
    assert (np.diff(opacity.ravel().astype(int)) > 0).all()
    assert opacity[1, 1] == heat.STRONGEST
    nothing = heat.overlay(np.zeros((2, 2)), 0.0)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(nothing.partition(",")[2]))))
    assert pixels[..., 3].max() == 0


def test_rare_places_are_those_behind_which_few_images_stand() -> None:
    entropy = np.log(np.array([[1.0, 4.0, 16.0]]))
    assert heat.rarity(entropy, 16) == pytest.approx(np.array([[1.0, 0.5, 0.0]]))
    assert heat.rarity(entropy, 256) == pytest.approx(np.array([[1.0, 0.75, 0.5]]))
    assert heat.rarity(np.zeros((2, 2)), heat.LEAST).min() == 1
    assert heat.behind(entropy) == pytest.approx((1.0, 16.0))


def test_every_method_is_explained_and_none_promises_what_it_cannot_say() -> None:
    from forebear.methods import METHODS

    assert set(meanings.MEANINGS) <= {*METHODS, "pixels"}
    for name in METHODS:
        assert all(meanings.meaning(name))
    signed = meanings.meaning("trak").at_length
    assert "worse at this" in signed
    assert "cannot say" in meanings.meaning("das").at_length  # it is squared
    assert "cannot say" in meanings.meaning("das", {"form": "linear"}).at_length
    encoded = {"features": {"about": "clip"}}
    assert "model" not in meanings.meaning("similarity", encoded).hint
    assert "to the model" in meanings.meaning("similarity", {"features": "hidden"}).hint
    for name in ("nda", "pixels"):  # these ask no model
        assert "worse" not in meanings.meaning(name).at_length
        assert "asked" in meanings.meaning(name).at_length


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_a_training_image_shows_where_it_matters_by_keyboard(
    folder: Path, page: str, width: int
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    complaints: list[str] = []
    requests: set[str] = set()
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.add(request.url.split(":")[0]))
        tab.goto((folder / "report.html").as_uri())
        panel = tab.locator(".panel").first
        panel.locator(".row").nth(1).locator(".one").first.focus()
        same = panel.locator(".one.same").count()
        shown = panel.locator(".heat.shown").count()
        picture = panel.locator(".heat").evaluate("heat => heat.style.backgroundImage")
        tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Shift+Tab")
        moved = panel.locator(".heat.shown").count()
        sizes = tab.locator(".large .picture").evaluate_all("all => all.map(p => p.clientWidth)")
        overflow = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        browser.close()
    assert complaints == []
    assert requests <= {"file", "data"}
    assert overflow <= 0
    assert min(sizes) > 100
    assert (same, shown, moved) == (3, 1, 0)
    assert picture.removeprefix('url("').removesuffix('")') in page
