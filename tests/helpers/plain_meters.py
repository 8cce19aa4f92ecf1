"""The meters' formulas with sums in plain attributes, one after another: what the metrics of
torchmetrics are compared with, bit for bit."""

import math

import torch

from dbmtl.benchmarks.dense_prediction import angle_degrees


class PlainMAE:
    def __init__(self, factor=1.0):
        self.factor = factor
        self.total = 0.0
        self.count = 0

    def update(self, prediction, target):
        self.total = self.total + (prediction - target).abs().sum(dtype=torch.float64)
        self.count += target.numel()

    def compute(self):
        return {"MAE": self.factor * float(self.total) / max(self.count, 1)}


class PlainZScore(PlainMAE):
    def update(self, prediction, target):
        super().update(prediction * target[:, 1], target[:, 0] * target[:, 1])


class PlainAccuracy:
    def __init__(self):
        self.right = 0
        self.count = 0

    def update(self, prediction, target):
        self.right += int((prediction.argmax(dim=1) == target).sum())
        self.count += target.numel()

    def compute(self):
        return {"Acc": 100.0 * self.right / max(self.count, 1)}


class PlainSegmentation:
    def __init__(self, classes):
        self.classes = classes
        self.matrix = torch.zeros(classes, classes, dtype=torch.float64)

    def update(self, prediction, target):
        labeled = target != 255
        predicted = prediction.max(dim=1).indices[labeled]
        cell = target[labeled].long() * self.classes + predicted
        self.matrix += cell.bincount(minlength=self.classes**2).view_as(self.matrix)

    def compute(self):
        right = self.matrix.diagonal()
        iou = right / (self.matrix.sum(0) + self.matrix.sum(1) - right)
        accuracy = right.sum() / self.matrix.sum()
        return {"mIoU": 100 * float(iou.nanmean()), "PAcc": 100 * float(accuracy)}


class PlainDepth:
    def __init__(self, relative_factor=1.0):
        self.relative_factor = relative_factor
        self.absolute = 0.0
        self.relative = 0.0
        self.count = 0

    def update(self, prediction, target):
        valid = target != 0
        error = (prediction.where(valid, target) - target).abs()
        self.absolute += float(error.sum(dtype=torch.float64))
        relative = error / target.where(valid, target.new_ones(()))
        self.relative += float(relative.sum(dtype=torch.float64))
        self.count += int(valid.sum())

    def compute(self):
        if self.count == 0:
            return {"AErr": math.nan, "RErr": math.nan}
        relative = self.relative / self.count
        return {"AErr": self.absolute / self.count, "RErr": self.relative_factor * relative}


class PlainNormal:
    limits = (11.25, 22.5, 30.0)

    def __init__(self):
        self.total = 0.0
        self.angles = []

    def update(self, prediction, target):
        angle = angle_degrees(prediction, target)
        valid = target.any(dim=1)
        self.total += float(angle.where(valid, angle.new_zeros(())).sum(dtype=torch.float64))
        self.angles += angle[valid].tolist()

    def compute(self):
        count = len(self.angles)
        names = ["Mean", "Median", *(f"W{limit:g}" for limit in self.limits)]
        if count == 0:
            return dict.fromkeys(names, math.nan)
        bins = sorted(min(int(torch.tensor(angle) * 1000), 179_999) for angle in self.angles)
        median = ((bins[(count - 1) // 2] + bins[count // 2]) / 2 + 0.5) / 1000
        within = [sum(angle < limit for angle in self.angles) for limit in self.limits]
        values = [self.total / count, median, *(100 * number / count for number in within)]
        return dict(zip(names, values, strict=True))
