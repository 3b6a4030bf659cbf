"""Heads with drawn numbers, as if they had been trained."""

import torch
from torch import nn
from trunkline_wire.heads import HeadConfig
from trunkline_worker.heads.inputs import HeadInput
from trunkline_worker.heads.model import Head, TrainedHead

POOLED = HeadInput(("pooled",), (37,))


def drawn_head(config=None, inputs=(POOLED,), num_outputs=4, task="classification", seed=0):
    """Return a head whose every number is drawn: means, scales and statistics of normalisations too.

    Of classes in order there is one more than outputs.
    """
    head = Head(config or HeadConfig(), inputs, num_outputs)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) / fan_in**0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=draw))
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for one in (module.weight, module.bias, module.running_mean):
                    one.copy_(torch.randn(one.shape, generator=draw))
                module.running_var.copy_(0.1 + torch.rand(module.running_var.shape, generator=draw))
        head.mean.copy_(torch.randn(head.mean.shape, generator=draw))
        head.scale.copy_(0.5 + torch.rand(head.scale.shape, generator=draw))
    num_classes = num_outputs + (task == "ordinal")
    names = () if task == "regression" else tuple(f"class {index}" for index in range(num_classes))
    return TrainedHead(head.eval(), task, names)
