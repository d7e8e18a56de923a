"""The networks that nets.py tries, of torch, torchvision, timm and transformers: smallest variants, random weights."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from training.torchvision_import import import_torchvision

CLASSES = 10


class Net(NamedTuple):
    """A network to try.

    Attributes:
        name: of the row.
        points: a regular expression for their names.
        small: makes the network that is tried.
        usual: makes the one whose B is measured.
        sizes: side of the images or length of the texts, of `small` and of `usual`.
        class_dim: dimension of the logits' classes and of an activation's features.
        key: the keyword that the input goes by, if any; "input_ids" is a text.
        logits: where the output has them, if it is not they.
    """

    name: str
    points: str
    small: Callable[[], nn.Module]
    usual: Callable[[], nn.Module]
    sizes: tuple[int, int]
    class_dim: int
    key: str | None = None
    logits: str | None = None


class Classifier(nn.Module):
    """A Transformer encoder over patches, and a linear layer on the mean token."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, CLASSES)."""
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def torch_nets() -> list[Net]:
    small, usual = partial(Classifier, 16, 2), partial(Classifier, 512, 6)
    return [Net("nn.TransformerEncoder", r"encoder\.layers\.\d+", small, usual, (32, 224), -1)]


def torchvision_nets() -> list[Net]:
    models = import_torchvision().models

    def net(name: str, points: str, side: int = 64, logits: str | None = None, **options: Any) -> Net:
        make = partial(models.get_model, name.split(",")[0], weights=None, num_classes=CLASSES, **options)
        return Net(name, points, make, make, (side, 224), 1, None, logits)

    def shrunk(name: str, points: str, small: Callable[..., nn.Module], class_dim: int, **options: Any) -> Net:
        small = partial(small, num_classes=CLASSES, **options)
        return net(name, points, 32)._replace(small=small, class_dim=class_dim)

    vit = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    swin = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    maxvit = {"input_size": (32, 32), "stem_channels": 8, "block_channels": [8, 16], "block_layers": [1, 1]}
    maxvit |= {"head_dim": 4, "partition_size": 4, "stochastic_depth_prob": 0.2}
    no_aux: dict[str, Any] = {"init_weights": False, "aux_logits": False}
    segments: dict[str, Any] = {"logits": "out", "weights_backbone": None}
    return [
        net("alexnet", r"features\.(2|5|12)|classifier\.[25]"),
        net("vgg11", r"features\.(2|5|10|15|20)|classifier\.[14]", 32),
        net("squeezenet1_1", r"features\.(2|5|8|12)"),
        net("resnet18", r"layer\d"),
        net("resnet18, within blocks", r"layer\d\.\d\.conv2"),
        net("densenet121", r"features\.(pool0|transition\d|denseblock4)"),
        net("densenet121, within blocks", r"features\.denseblock\d\.denselayer2"),
        net("mobilenet_v2", r"features\.(1|3|6|13|17|18)"),
        net("mobilenet_v3_small", r"features\.(1|3|8|12)"),
        net("efficientnet_b0", r"features\.[1-8]"),
        net("convnext_tiny", r"features\.[1357]"),
        net("regnet_y_400mf", r"trunk_output\.block\d"),
        net("shufflenet_v2_x0_5", r"maxpool|stage\d|conv5"),
        net("mnasnet0_5", r"layers\.(8|9|10|11|12|13|16)"),
        net("googlenet", r"maxpool\d|inception5b", init_weights=False, logits="logits"),
        net("googlenet, aux_logits=False", r"maxpool\d|inception5b", **no_aux),
        net("inception_v3, aux_logits=False", r"maxpool2|Mixed_(5d|6e|7c)", **no_aux)._replace(sizes=(96, 299)),
        shrunk("vit_b_16", r"encoder\.layers\.encoder_layer_\d+", models.VisionTransformer, -1, **vit),
        shrunk("swin_t", r"features\.[1357]", models.SwinTransformer, -1, **swin),
        shrunk("maxvit_t", r"blocks\.\d", models.MaxVit, 1, **maxvit),
        net("fcn_resnet50", r"backbone\.layer\d", 32, **segments),
        net("deeplabv3_resnet50", r"backbone\.layer\d", 32, **segments),
    ]


def timm_nets() -> list[Net]:
    import_torchvision()  # which timm imports
    import timm

    def net(name: str, points: str, side: int = 64, class_dim: int = 1, **options: Any) -> Net:
        make = partial(timm.create_model, name, num_classes=CLASSES)
        return Net(f"timm {name}", points, partial(make, **options), make, (side, 224), class_dim)

    vit: dict[str, Any] = {"img_size": 32, "depth": 2, "num_heads": 2, "embed_dim": 16}
    return [
        net("resnet18", r"layer\d"),
        net("convnext_atto", r"stages\.\d"),
        net("mobilenetv3_small_050", r"blocks\.\d"),
        net("poolformer_s12", r"stages\.\d"),
        net("vit_tiny_patch16_224", r"blocks\.\d+", 32, -1, **vit),
        net("deit_tiny_patch16_224", r"blocks\.\d+", 32, -1, **vit),
        net("mixer_s16_224", r"blocks\.\d+", 32, -1, img_size=32),
    ]


def transformers_nets() -> list[Net]:
    import_torchvision()  # which transformers imports
    import transformers

    def net(name: str, points: str, key: str = "input_ids", class_dim: int = -1, **small: Any) -> Net:
        of_name = name.split(",")[0]
        config = getattr(transformers, re.split("For|LMHead", of_name)[0] + "Config")

        def make(**options: Any) -> nn.Module:
            return getattr(transformers, of_name)(config(num_labels=CLASSES, **options))

        sizes = (12, 512) if key == "input_ids" else (32, 224)
        return Net(name, points, partial(make, **small), make, sizes, class_dim, key, "logits")

    bert: dict[str, Any] = {"vocab_size": CLASSES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert |= {"intermediate_size": 32, "max_position_embeddings": 32}
    distilbert: dict[str, Any] = {"vocab_size": CLASSES, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    gpt2: dict[str, Any] = {"vocab_size": CLASSES, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    gpt2 |= {"bos_token_id": 0, "eos_token_id": 0}
    t5: dict[str, Any] = {"vocab_size": CLASSES, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    vit: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 32, "patch_size": 8}
    swin: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
    swin |= {"window_size": 4}
    convnext: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    ends, of_gpt2, image = (
        r"(embeddings|(encoder|transformer)\.layer\.\d+)",
        r"transformer\.(drop|h\.\d+)",
        "pixel_values",
    )
    return [
        net("BertForSequenceClassification", rf"bert\.{ends}", **bert),
        net("RobertaForSequenceClassification", rf"roberta\.{ends}", **bert),
        net("DistilBertForSequenceClassification", rf"distilbert\.{ends}", **distilbert),
        net("GPT2LMHeadModel, tied weights", of_gpt2, **gpt2),
        net("GPT2LMHeadModel, tie_word_embeddings=False", of_gpt2, tie_word_embeddings=False, **gpt2),
        net("LlamaForCausalLM", r"model\.layers\.\d+", **bert),
        net("T5ForTokenClassification", r"transformer\.encoder\.block\.\d+\.layer\.1", **t5),
        net("ViTForImageClassification", r"vit\.layers\.\d+", image, **vit),
        net("ConvNextForImageClassification", r"convnext\.encoder\.stages\.\d", image, 1, **convnext),
        net("SwinForImageClassification, stages", r"swin\.encoder\.layers\.\d", image, **swin),
        net("SwinForImageClassification", r"swin\.(encoder\.layers\.\d\.downsample|layernorm)", image, **swin),
    ]


NETS: dict[str, Callable[[], list[Net]]] = {  # by the package that they need
    "torch": torch_nets,
    "torchvision": torchvision_nets,
    "timm": timm_nets,
    "transformers": transformers_nets,
}
