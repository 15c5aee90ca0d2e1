"""The works that a report may have to cite: bibliographic facts only, and two ways to print them.

A DOI is given where it was looked up; where it was not, it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """One work.

    Attributes:
        key: In BibTeX.
        authors: ``Family, I. I.``; a group under its own name.
        venue: Journal, or proceedings.
        kind: ``article`` or ``inproceedings``.
    """

    key: str
    authors: tuple[str, ...]
    year: int
    title: str
    venue: str
    kind: str = "inproceedings"
    volume: str = ""
    pages: str = ""
    doi: str = ""
    arxiv: str = ""

    @property
    def short(self) -> str:
        """``Kim et al., 2023``."""
        names = [author.partition(",")[0] for author in self.authors]
        who = {1: names[0], 2: " & ".join(names[:2])}.get(len(names), f"{names[0]} et al.")
        return f"{who}, {self.year}"

    @property
    def text(self) -> str:
        """One line of a list of references."""
        *most, last = self.authors
        who = f"{', '.join(most)}, & {last}" if most else last
        where = ", ".join(part for part in (self.venue, self.volume, self.pages) if part)
        more = f" https://doi.org/{self.doi}" if self.doi else ""
        more = more or (f" arXiv:{self.arxiv}" if self.arxiv else "")
        return f"{who.rstrip('.')}. ({self.year}). {self.title}. {where}.{more}"

    @property
    def bibtex(self) -> str:
        """An entry."""
        where = {"article": "journal"}.get(self.kind, "booktitle")
        fields = {
            "author": " and ".join(self.authors),
            "title": f"{{{self.title}}}",
            where: self.venue,
            "year": str(self.year),
            "volume": self.volume,
            "pages": self.pages.replace("–", "--"),
            "doi": self.doi,
            "eprint": self.arxiv,
            "archiveprefix": "arXiv" if self.arxiv else "",
        }
        safe = {name: value.replace("&", r"\&") for name, value in fields.items() if value}
        lines = [f"  {name} = {{{value}}}" for name, value in safe.items()]
        return f"@{self.kind}{{{self.key},\n" + ",\n".join(lines) + "\n}"


_NEURIPS = "Advances in Neural Information Processing Systems"
_ICLR = "International Conference on Learning Representations"
_WORKS = (
    Reference(
        "kim2023swift",
        (
            *("Kim, P. Y.", "Kwon, J.", "Joo, S.", "Bae, S.", "Lee, D.", "Jung, Y."),
            *("Yoo, S.", "Cha, J.", "Moon, T."),
        ),
        2023,
        "SwiFT: Swin 4D fMRI Transformer",
        _NEURIPS,
        volume="36",
        pages="42015–42037",
        arxiv="2307.05916",
    ),
    Reference(
        "liu2021swin",
        (
            *("Liu, Z.", "Lin, Y.", "Cao, Y.", "Hu, H.", "Wei, Y.", "Zhang, Z.", "Lin, S."),
            "Guo, B.",
        ),
        2021,
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "IEEE/CVF International Conference on Computer Vision",
        pages="10012–10022",
        doi="10.1109/ICCV48922.2021.00986",
        arxiv="2103.14030",
    ),
    Reference(
        "xie2022simmim",
        (
            *("Xie, Z.", "Zhang, Z.", "Cao, Y.", "Lin, Y.", "Bao, J.", "Yao, Z.", "Dai, Q."),
            "Hu, H.",
        ),
        2022,
        "SimMIM: A Simple Framework for Masked Image Modeling",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        pages="9653–9663",
        doi="10.1109/CVPR52688.2022.00943",
        arxiv="2111.09886",
    ),
    Reference(
        "dao2024mamba2",
        ("Dao, T.", "Gu, A."),
        2024,
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality",
        "International Conference on Machine Learning",
        arxiv="2405.21060",
    ),
    Reference(
        "su2024roformer",
        ("Su, J.", "Ahmed, M.", "Lu, Y.", "Pan, S.", "Bo, W.", "Liu, Y."),
        2024,
        "RoFormer: Enhanced transformer with Rotary Position Embedding",
        "Neurocomputing",
        "article",
        "568",
        "127063",
        "10.1016/j.neucom.2023.127063",
        "2104.09864",
    ),
    Reference(
        "hu2022lora",
        (
            *("Hu, E. J.", "Shen, Y.", "Wallis, P.", "Allen-Zhu, Z.", "Li, Y.", "Wang, S."),
            *("Wang, L.", "Chen, W."),
        ),
        2022,
        "LoRA: Low-Rank Adaptation of Large Language Models",
        _ICLR,
        arxiv="2106.09685",
    ),
    Reference(
        "jia2022vpt",
        (
            *("Jia, M.", "Tang, L.", "Chen, B.-C.", "Cardie, C.", "Belongie, S."),
            *("Hariharan, B.", "Lim, S.-N."),
        ),
        2022,
        "Visual Prompt Tuning",
        "European Conference on Computer Vision",
        doi="10.1007/978-3-031-19827-4_41",
        arxiv="2203.12119",
    ),
    Reference(
        "yang2021mup",
        (
            *("Yang, G.", "Hu, E. J.", "Babuschkin, I.", "Sidor, S.", "Liu, X.", "Farhi, D."),
            *("Ryder, N.", "Pachocki, J.", "Chen, W.", "Gao, J."),
        ),
        2021,
        "Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
        _NEURIPS,
        volume="34",
        arxiv="2203.03466",
    ),
    Reference(
        "rasley2020deepspeed",
        ("Rasley, J.", "Rajbhandari, S.", "Ruwase, O.", "He, Y."),
        2020,
        "DeepSpeed: System Optimizations Enable Training Deep Learning Models with Over 100 "
        "Billion Parameters",
        "ACM SIGKDD International Conference on Knowledge Discovery & Data Mining",
        pages="3505–3506",
        doi="10.1145/3394486.3406703",
    ),
    Reference(
        "loshchilov2019adamw",
        ("Loshchilov, I.", "Hutter, F."),
        2019,
        "Decoupled Weight Decay Regularization",
        _ICLR,
        arxiv="1711.05101",
    ),
    Reference(
        "paszke2019pytorch",
        (
            *("Paszke, A.", "Gross, S.", "Massa, F.", "Lerer, A.", "Bradbury, J.", "Chanan, G."),
            *("Killeen, T.", "Lin, Z.", "Gimelshein, N.", "Antiga, L.", "Desmaison, A."),
            *("Köpf, A.", "Yang, E.", "DeVito, Z.", "Raison, M.", "Tejani, A."),
            *("Chilamkurthy, S.", "Steiner, B.", "Fang, L.", "Bai, J.", "Chintala, S."),
        ),
        2019,
        "PyTorch: An Imperative Style, High-Performance Deep Learning Library",
        _NEURIPS,
        volume="32",
        arxiv="1912.01703",
    ),
    Reference(
        "pedregosa2011sklearn",
        (
            *("Pedregosa, F.", "Varoquaux, G.", "Gramfort, A.", "Michel, V.", "Thirion, B."),
            *("Grisel, O.", "Blondel, M.", "Prettenhofer, P.", "Weiss, R.", "Dubourg, V."),
            *("Vanderplas, J.", "Passos, A.", "Cournapeau, D.", "Brucher, M.", "Perrot, M."),
            "Duchesnay, É.",
        ),
        2011,
        "Scikit-learn: Machine Learning in Python",
        "Journal of Machine Learning Research",
        "article",
        "12",
        "2825–2830",
    ),
    Reference(
        "abraham2014nilearn",
        (
            *("Abraham, A.", "Pedregosa, F.", "Eickenberg, M.", "Gervais, P.", "Mueller, A."),
            *("Kossaifi, J.", "Gramfort, A.", "Thirion, B.", "Varoquaux, G."),
        ),
        2014,
        "Machine learning for neuroimaging with scikit-learn",
        "Frontiers in Neuroinformatics",
        "article",
        "8",
        "14",
        "10.3389/fninf.2014.00014",
    ),
    Reference(
        "holm1979",
        ("Holm, S.",),
        1979,
        "A simple sequentially rejective multiple test procedure",
        "Scandinavian Journal of Statistics",
        "article",
        "6",
        "65–70",
    ),
    Reference(
        "phipson2010permutation",
        ("Phipson, B.", "Smyth, G. K."),
        2010,
        "Permutation P-values Should Never Be Zero: Calculating Exact P-values When Permutations "
        "Are Randomly Drawn",
        "Statistical Applications in Genetics and Molecular Biology",
        "article",
        "9",
        "39",
    ),
    Reference(
        "haxby2001",
        (
            *("Haxby, J. V.", "Gobbini, M. I.", "Furey, M. L.", "Ishai, A.", "Schouten, J. L."),
            "Pietrini, P.",
        ),
        2001,
        "Distributed and Overlapping Representations of Faces and Objects in Ventral Temporal "
        "Cortex",
        "Science",
        "article",
        "293",
        "2425–2430",
        "10.1126/science.1063736",
    ),
)
WORKS = {work.key: work for work in _WORKS}
