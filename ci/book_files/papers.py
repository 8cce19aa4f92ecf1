"""Where the paper of each method is; the rest of what is known about it stands in its facts."""

ARXIV = {
    "GLS": "1904.08492",
    "RLW": "2111.10603",
    "UW": "1705.07115",
    "DWA": "1803.10704",
    "IGBv2": "2307.15429",
    "MGDA": "1810.04650",
    "MGDA-UB": "1810.04650",
    "GradNorm": "1711.02257",
    "PCGrad": "2001.06782",
    "GradDrop": "2010.06808",
    "GradDrop-features": "2010.06808",
    "GradVac": "2010.05874",
    "CAGrad": "2110.14048",
    "MTAdam": "2006.14683",
    "Nash-MTL": "2202.01017",
    "MetaBalance": "2203.06801",
    "MoCo": "2210.12624",
    "Aligned-MTL": "2305.19000",
    "loss-only": "2308.12029",
    "gradient-only": "2308.12029",
    "DB-MTL": "2308.12029",
    "LS": "2201.04122",
    "UW-SO": "2408.07985",
    "FAMO": "2306.03792",
    "STCH": "2402.19078",
    "FairGrad": "2402.15638",
    "UPGrad": "2406.16232",
    "ConFIG": "2408.11104",
    "ExcessMTL": "2402.02009",
    "SDMGrad": "2305.18409",
    "MoDo": "2305.20057",
}
IMTL = "https://openreview.net/forum?id=IMPnRXEWpvr"  # not on arXiv
OTHERS = {"IMTL": IMTL, "IMTL-L": IMTL, "IMTL-G": IMTL, "IMTL-G-features": IMTL}
WITHOUT_PAPER = {"EW"}


def paper_of(name):
    """The address of a method's paper; None for equal weighting, which has none."""
    if name in WITHOUT_PAPER:
        return None
    return OTHERS.get(name) or f"https://arxiv.org/abs/{ARXIV[name]}"
