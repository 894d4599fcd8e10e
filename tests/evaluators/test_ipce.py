"""Eqs. 1-3 and the published head against independent float64 computations from the open_clip model itself."""

import json
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from acpo_utils.evaluators import IPCE
from tests.tiny_models import CAPTIONS, build_clip_folder, tiny_tokenizer


LEVEL_PROMPTS = [
    "a photo that badly matches '{}'",
    "a photo that poorly matches '{}'",
    "a photo that fairly matches '{}'",
    "a photo that well matches '{}'",
    "a photo that perfectly matches '{}'",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reference(folder):
    """The same open_clip model, loaded by open_clip alone, in float64, and its tokenizer."""
    name = f"local-dir:{folder}"
    return open_clip.create_model(name).double().eval(), open_clip.get_tokenizer(name)


@pytest.fixture
def alignment(folder):
    model = IPCE.from_open_clip(str(folder), structure_layers=[0, -1])
    with torch.no_grad():
        model.layer_logits.copy_(torch.tensor([0.3, -0.4]))
        model.a.fill_(4.0)
        model.b.fill_(-1.5)
        model.bias.fill_(0.25)
    return model.requires_grad_(False)


@pytest.fixture
def levels(folder):
    return IPCE.from_open_clip(str(folder), head="prompt_levels", num_crops=4).requires_grad_(False)


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normalise(images):
    mean = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(3, 1, 1)  # of tiny_clip's preprocess_cfg
    std = torch.tensor([0.3, 0.25, 0.2], dtype=torch.float64).view(3, 1, 1)
    return (images.double() - mean) / std


def layer_tokens(clip, images):
    """Output tokens of every vision block, (B, 1 + P, C) each, caught by hooks."""
    caught = []
    hooks = [
        block.register_forward_hook(lambda *args: caught.append(args[2]))
        for block in clip.visual.transformer.resblocks
    ]
    clip.visual(images)
    for hook in hooks:
        hook.remove()
    return caught


@torch.no_grad()
def test_equations_1_to_3(alignment, reference):
    clip, tokenizer = reference
    images = random_images(3, 3, 16, 16)
    f_image, f_text = clip.encode_image(normalise(images)), clip.encode_text(tokenizer(CAPTIONS))
    s_align = (f_image * f_text).sum(1) / (f_image.norm(dim=1) * f_text.norm(dim=1))
    tokens = layer_tokens(clip, normalise(images))
    weights = [1 / (1 + torch.tensor(-0.7).double().exp()), 1 / (1 + torch.tensor(0.7).double().exp())]
    s_struct = 0
    for layer, weight in zip((0, 2), weights):
        g, p = tokens[layer][:, 0], tokens[layer][:, 1:]
        cosines = torch.stack([(p[:, i] * g).sum(1) / (p[:, i].norm(dim=1) * g.norm(dim=1)) for i in range(16)])
        s_struct = s_struct + weight * cosines.mean(0)
    expected = 1 / (1 + torch.exp(-(4.0 * s_align - 1.5 * s_struct + 0.25)))
    assert alignment.config.structure_layers == [0, 2]
    assert expected.std() > 0.01
    torch.testing.assert_close(alignment.score(images, CAPTIONS).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trunk, stages", [("test_efficientnet", "blocks"), ("test_convnext", "stages")])
def test_equation_2_on_a_convolutional_tower(tmp_path, trunk, stages):
    folder = build_clip_folder(tmp_path, vision={"timm_model_name": trunk, "timm_proj": "linear", "image_size": 64})
    model = IPCE.from_open_clip(str(folder), structure_layers=[0, -1])
    assert model.config.structure_layers == [0, {"blocks": 4, "stages": 3}[stages]]
    with torch.no_grad():
        model.layer_logits.copy_(torch.tensor([0.3, -0.4]))
    images = random_images(3, 3, 64, 64)
    clip, tokenizer = (
        open_clip.create_model(f"local-dir:{folder}").eval(),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
    )
    caught = []
    for layer in (0, -1):
        getattr(clip.visual.trunk, stages)[layer].register_forward_hook(lambda *args: caught.append(args[2].double()))
    with torch.no_grad():
        f_image, f_text = clip.encode_image(normalise(images).float()), clip.encode_text(tokenizer(CAPTIONS))
        s_align, s_struct = model.similarities(images, CAPTIONS)
    expected = 0
    for maps, weight in zip(caught, torch.tensor([0.3, -0.4]).double().softmax(0)):
        tokens = maps.flatten(2)  # (B, C, P)
        expected = expected + weight * F.cosine_similarity(tokens, tokens.mean(2, keepdim=True), dim=1).mean(1)
    torch.testing.assert_close(s_align, F.cosine_similarity(f_image, f_text))
    torch.testing.assert_close(s_struct.double(), expected, atol=1e-5, rtol=0)
    assert s_struct.std() > 1e-4
    images.requires_grad_()
    model.score(images, CAPTIONS).sum().backward()
    assert images.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved", dtype=torch.float16)
    again = IPCE.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.score(images, CAPTIONS), model.score(images, CAPTIONS), atol=1e-2, rtol=0)


def test_one_image_alone_has_the_gradient_that_it_has_among_others(tmp_path):
    """torch's batch normalisation misread it on the CPU: the score of one image had the gradient of no image."""
    folder = build_clip_folder(
        tmp_path, vision={"timm_model_name": "test_efficientnet", "timm_proj": "linear", "image_size": 64}
    )
    model = IPCE.from_open_clip(str(folder)).requires_grad_(False)
    images = random_images(3, 3, 64, 64)

    def gradient(images, prompts):
        inputs = images.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(model.score(inputs, prompts).sum(), inputs)
        return found

    together = gradient(images, CAPTIONS)
    assert together.abs().mean() > 0
    alone = torch.cat([gradient(image, [caption]) for image, caption in zip(images.split(1), CAPTIONS)])
    torch.testing.assert_close(alone, together, atol=1e-4 * together.abs().max().item(), rtol=0)


def test_a_tower_without_inner_layers_is_refused(tmp_path):
    folder = build_clip_folder(
        tmp_path, vision={"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    )
    with pytest.raises(
        ValueError, match="vision transformers and timm's convolutional networks give them, found ModifiedResNet"
    ):
        IPCE.from_open_clip(str(folder))


@torch.no_grad()
def test_published_head(levels, reference):
    clip, tokenizer = reference
    images = random_images(3, 3, 60, 44)  # both sides above crop_resolution: crops are cut without resizing
    assert (levels.config.crop_resolution, levels.config.crop_stride) == (37, 2)
    corners = [(top, left) for top in range(0, 45, 2) for left in range(0, 29, 2)]
    chosen = [corners[k * len(corners) // 4] for k in range(4)]
    whole = F.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    expected = []
    for i, caption in enumerate(CAPTIONS):
        f_text = F.normalize(clip.encode_text(tokenizer([text.format(caption) for text in LEVEL_PROMPTS])), dim=1)
        crops = torch.stack([images[i, :, top : top + 16, left : left + 16] for top, left in chosen])
        f_image = F.normalize(clip.encode_image(normalise(torch.cat([crops, whole[i : i + 1]]))), dim=1)
        logits = clip.logit_scale.exp() * f_image @ f_text.T  # (5, 5)
        distribution = (logits[:4].mean(0).softmax(0) + logits[4].softmax(0)) / 2
        expectation = sum(level * probability for level, probability in zip((1, 2, 3, 4, 5), distribution))
        expected.append((expectation - 1) / 4 * 5)
    scores = levels.score(images, CAPTIONS)
    assert levels.score_range == (0.0, 5.0)
    assert torch.stack(expected).std() > 1e-3, "a hundred times the tolerance lies between the images"
    torch.testing.assert_close(scores.double() * 5, torch.stack(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_small_images_are_enlarged_for_crops_and_random_crops_follow_the_generator(levels):
    images = random_images(2, 3, 12, 30)
    whole, crops = levels.views(images)
    assert whole.shape == (2, 3, 16, 16) and crops.shape == (2, 4, 3, 16, 16)
    enlarged = F.interpolate(images, (37, round(30 * 37 / 12)), mode="bicubic", antialias=True)
    torch.testing.assert_close(crops[:, 0], enlarged[..., :16, :16])
    first, second, third = (levels.views(images, 7, torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1))
    assert first.shape == (2, 7, 3, 16, 16) and torch.equal(first, second) and not torch.equal(first, third)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 8000), (8000, 1)])
def test_of_a_strip_the_middle_is_enlarged_for_crops(levels, size, monkeypatch):
    """Enlarged whole, it would take gigabytes."""
    enlarged = []
    resize = F.interpolate

    def watched(images, target, **options):
        enlarged.append(target)
        return resize(images, target, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    images = random_images(1, 3, *size)
    whole, crops = levels.views(images)
    assert whole.shape == (1, 3, 16, 16) and crops.shape == (1, 4, 3, 16, 16)
    assert max(map(max, enlarged)) == 16 * 37
    middle = images[..., 3992:4008] if size[0] == 1 else images[..., 3992:4008, :]
    torch.testing.assert_close(crops, levels.views(middle)[1])


@pytest.mark.parametrize("head", ["alignment", "levels"])
@pytest.mark.parametrize("size", [(16, 16), (21, 40), (64, 10)])
def test_gradient_against_finite_differences(head, size, request):
    model = request.getfixturevalue(head).double()
    images = random_images(2, 3, *size).requires_grad_(True)
    # score() computes in fp32; in float64 the same path can be differenced.
    whole, crops = model.views(images.double())
    model(whole, crops, CAPTIONS[:2]).sum().backward()
    assert images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()
    direction = random_images(2, 3, *size, seed=1).double() - 0.5
    step = 1e-4
    with torch.no_grad():
        plus, minus = (
            model(*model.views(images.double() + sign * step * direction), CAPTIONS[:2]).double().sum()
            for sign in (1, -1)
        )
    slope = (images.grad.double() * direction).sum()
    torch.testing.assert_close((plus - minus) / (2 * step), slope, rtol=0.05, atol=2e-3 * images.grad.norm().item())


@pytest.mark.parametrize("head", ["alignment", "levels"])
def test_scores_do_not_depend_on_the_rest_of_the_batch(head, request):
    model = request.getfixturevalue(head)
    images = random_images(3, 3, 24, 18)
    together = model.score(images, CAPTIONS)
    alone = torch.cat([model.score(images[i : i + 1], CAPTIONS[i : i + 1]) for i in range(3)])
    assert together.shape == (3,) and ((together > 0) & (together < 1)).all()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bundled_tokenizer", [False, True])
@pytest.mark.parametrize("head", ["alignment_structure", "prompt_levels"])
def test_save_and_load(tmp_path, head, bundled_tokenizer):
    clip = build_clip_folder(tmp_path / "clip", seed=3, bundled_tokenizer=bundled_tokenizer)
    model = IPCE.from_open_clip(str(clip), head=head, num_crops=2)
    images = random_images(3, 3, 20, 16)
    expected = model.score(images, CAPTIONS)
    model.save_pretrained(tmp_path / "evaluator")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (clip / name).unlink()  # what was saved stands alone
    loaded = IPCE.from_pretrained(tmp_path / "evaluator")
    assert torch.equal(loaded.score(images, CAPTIONS), expected)
    assert not loaded.training and not loaded.clip.logit_scale.requires_grad
    assert json.loads((tmp_path / "evaluator/config.json").read_text())["_class_name"] == "IPCE"
    half = IPCE.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "half/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for name, weight in stored.items() if name.startswith("clip.")} == {torch.float16}
    assert all(p.dtype == torch.float32 for p in model.parameters())  # the model itself stays as it was
    torch.testing.assert_close(half.score(images, CAPTIONS), expected, atol=5e-3, rtol=0)


def test_model_name_with_local_weights_file(tmp_path):
    """What `--clip_model NAME --clip_pretrained FILE` does; the tokenizer is then the one of the named model."""
    clip = build_clip_folder(tmp_path / "clip", bundled_tokenizer=True)
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny-test.json")
    named = IPCE.from_open_clip("ViT-tiny-test", str(clip / "open_clip_model.safetensors"))
    for name, weight in load_file(clip / "open_clip_model.safetensors").items():
        assert torch.equal(named.clip.state_dict()[name], weight)
    assert named.config.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])  # open_clip's own default
    assert named.score(random_images(1, 3, 20, 16), CAPTIONS[:1]).shape == (1,)


def test_missing_or_foreign_tensors_raise(tmp_path, alignment):
    alignment.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "clip.visual.proj"}, file)
    with pytest.raises(ValueError, match="missing tensors.*clip.visual.proj"):
        IPCE.from_pretrained(tmp_path)
    save_file(weights | {"something": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="unexpected tensors.*something"):
        IPCE.from_pretrained(tmp_path)


def build_tokenizer_kind(folder, kind):
    """The tiny CLIP with open_clip's bundled tokenizer, one that pads with a token of its own, or with its end token."""
    build_clip_folder(folder, bundled_tokenizer=kind != "own pad")
    if kind == "pad is end":
        tiny_tokenizer().save_pretrained(folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["bundled", "own pad", "pad is end"])
def test_long_prompts_are_truncated_with_one_warning(tmp_path, kind):
    model = IPCE.from_open_clip(str(build_tokenizer_kind(tmp_path, kind))).requires_grad_(False)
    inner = getattr(model.tokenizer, "tokenizer", None)
    assert (inner is None) == (kind == "bundled")
    assert inner is None or (inner.pad_token_id == inner.eos_token_id) == (kind == "pad is end")
    # One token for each "!", and one each for start and end: the longest text that fits, and one token more.
    fits, longer = " ".join("!" * 46), " ".join("!" * 47)
    if kind == "own pad":  # whose space is a token too
        fits, longer = "!" * (46 - len(inner(" ").input_ids) + 2), "!" * (47 - len(inner(" ").input_ids) + 2)
    images = random_images(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(images, [fits, CAPTIONS[1][:20]])
    with pytest.warns(UserWarning, match="longer than 48 tokens are truncated; first, of 49: '!"):
        model.score(images, [CAPTIONS[1][:20], longer])
    long = "a fox and an owl " * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = model.score(images, [long, "an owl"])
        again = model.score(images, [long + "and more", "an owl"])
    torch.testing.assert_close(scores, again)


def test_prompt_embeddings_are_kept_until_the_text_tower_changes(alignment):
    images = random_images(3, 3, 16, 16)
    calls = []
    encode = alignment.clip.encode_text
    alignment.clip.encode_text = lambda tokens: calls.append(len(tokens)) or encode(tokens)
    with torch.inference_mode():
        alignment.score(images, [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    before = alignment.score(images.requires_grad_(True), CAPTIONS)
    before.sum().backward()  # embeddings kept under inference mode can still be part of a graph
    assert calls == [1, 1, 1]
    with torch.no_grad():
        alignment.clip.text_projection.mul_(-1)
    assert not torch.allclose(alignment.score(images, CAPTIONS), before)
    assert calls == [1] * 6
    alignment.clip.text_projection.requires_grad_(True)
    alignment.score(images, CAPTIONS).sum().backward()
    assert alignment.clip.text_projection.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["alignment", "levels"])
def test_autocast_scores_in_fp32(head, dtype, request):
    model = request.getfixturevalue(head)
    images = random_images(3, 3, 20, 16).requires_grad_(True)
    expected = model.score(images, CAPTIONS)
    expected.sum().backward()
    gradient, images.grad = images.grad, None
    with torch.autocast("cpu", dtype):
        scores = model.score(images.to(dtype), CAPTIONS)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.02, rtol=0)
    assert F.cosine_similarity(images.grad.flatten(), gradient.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("head", ["alignment", "levels"])
def test_a_kept_embedding_does_not_depend_on_what_was_asked_with_it(head, request):
    """A resumed run meets its prompts in other company than the uninterrupted one, and has to equal it bit for bit."""
    model, prompts = request.getfixturevalue(head), [f"{caption} {i}" for i in range(8) for caption in CAPTIONS]
    together = model._encode_text(prompts)
    alone = []
    for prompt in prompts:
        model._text_cache = {}
        alone.append(model._encode_text([prompt]))
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("head", ["alignment", "levels"])
def test_weights_in_bf16(head, request):
    model, images = request.getfixturevalue(head), random_images(3, 3, 20, 16)
    expected = model.score(images, CAPTIONS)
    scores = model.to(torch.bfloat16).score(images.requires_grad_(True), CAPTIONS)
    torch.testing.assert_close(scores.float(), expected, atol=0.03, rtol=0)
    scores.sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


@pytest.mark.parametrize("head", ["alignment_structure", "prompt_levels"])
def test_what_learns_and_that_accumulated_gradients_are_those_of_the_whole_batch(folder, head):
    """Everything but logit_scale learns, a, b, bias and the layer weights of eqs. 2 and 3 included."""
    images, targets = random_images(4, 3, 40, 44), torch.tensor([0.1, 0.9, 0.3, 0.6])
    prompts = [*CAPTIONS, "a red owl"]

    def gradients(micro_batch):
        model = IPCE.from_open_clip(str(folder), head=head, num_crops=2)
        for rows in torch.arange(4).split(micro_batch):
            scores = model.score(images[rows], [prompts[row] for row in rows])
            (F.l1_loss(scores, targets[rows]) * micro_batch / 4).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole, accumulated = gradients(4), gradients(2)
    still = [name for name, gradient in whole.items() if gradient is None or not gradient.any()]
    assert still == ["clip.logit_scale"]
    assert ("layer_logits" in whole) == ("a" in whole) == (head == "alignment_structure")
    for name in whole.keys() - {"clip.logit_scale"}:
        torch.testing.assert_close(accumulated[name], whole[name], atol=1e-6, rtol=1e-4)


def test_partly_frozen_towers(folder):
    """open_clip's locks: what is frozen has no gradient; with a trained part of the text tower nothing is cached."""
    images = random_images(3, 3, 16, 16)
    model = IPCE.from_open_clip(str(folder))
    model.clip.lock_image_tower(1)
    model.clip.lock_text_tower(1)
    model.score(images, CAPTIONS).sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    text = {name for name in learned if not name.startswith("clip.visual.")} - {"a", "b", "bias", "layer_logits"}
    assert {name for name in learned if name.startswith("clip.visual.")} == {"clip.visual.proj"}
    assert text and text < {f"clip.{name}" for name, _ in model.clip.named_parameters()} - {
        "clip.token_embedding.weight"
    }
    assert not model._text_cache
    with torch.no_grad():
        before = model.score(images, CAPTIONS)
        changed = next(p for name, p in model.named_parameters() if name in text)
        changed.add_(random_images(*changed.shape))
        assert not torch.allclose(model.score(images, CAPTIONS), before), "embeddings of the old weights were kept"
    model.clip.lock_text_tower(0)
    model.zero_grad()
    model.score(images, CAPTIONS).sum().backward()
    assert set(model._text_cache) == set(CAPTIONS)


def test_bad_arguments(folder, alignment, tmp_path):
    images = random_images(2, 3, 16, 16)
    for prompts in (None, "a fox", CAPTIONS):
        with pytest.raises(ValueError, match="prompts: expected a list of 2 strings"):
            alignment.score(images, prompts)
    with pytest.raises(ValueError, match="images: expected floats"):
        alignment.score(images[0], CAPTIONS)
    with pytest.raises(ValueError, match="images: expected floats"):
        alignment.score((images * 255).byte(), CAPTIONS[:2])
    with pytest.raises(ValueError, match="head: expected one of"):
        IPCE.from_open_clip(str(folder), head="other")
    with pytest.raises(ValueError, match="structure_layers: expected numbers from -3 to 2"):
        IPCE.from_open_clip(str(folder), structure_layers=[3])
    with pytest.raises(ValueError, match="needs weights"):
        IPCE.from_open_clip("ViT-B-32")
    with pytest.raises(ValueError, match="not a known tag or valid file path"):
        IPCE.from_open_clip("ViT-B-32", str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="neither"):
        IPCE.from_open_clip("no-such-model", "openai")
    with pytest.raises(ValueError, match="Cannot load CLIP"):
        IPCE.from_open_clip(f"local-dir:{tmp_path}")
