"""The empirical claims of the paper: where it makes them, how each is tested, what that can't do.

The words are ours. `measures.py` holds the tests, `paper.py` the numbers that the paper reports,
`evidence.py` the rule, and `scoreboard.py` writes the page.
"""

from dataclasses import dataclass

import measures as m
import paper


@dataclass(frozen=True)
class Claim:
    """What the paper says and where, how it is tested, and which chapter goes into it.

    command: what makes the record. limits: what the test can't do.
    graphs: whether the comparison adds a distillation graph and nothing else.
    """

    title: str
    place: str
    words: str
    chapter: str
    test: m.Test
    command: str
    limits: str = ""
    graphs: bool = False


TABLE = (
    "python -m dmd study {} --settings synthetic && "
    "python tools/ablation_pairs.py runs/studies/study synthetic"
)
TABLE1 = "python -m dmd study table1 --settings synthetic unaligned mosi_utterances"
TABLE3, TABLE4, TABLE5 = (TABLE.format(name) for name in ("table3", "table4", "table5"))
OBJECTIVE = "python tools/objective_study.py run"
OTHERS = "13_against_other_methods.ipynb#tables-1-and-2-with-intervals"
PARTS, EACH, ON_MULT = (
    f"12_ablations.ipynb#{anchor}"
    for anchor in (
        "table-3-parts-added-one-by-one", "table-4-each-modality-alone",
        "table-5-a-gd-unit-for-mult",
    )
)  # fmt: skip
LEAKAGE = "05_orthogonality.ipynb#the-recorded-study-five-seeds-every-term"
EDGES = "14_looking_inside.ipynb#the-arrows-of-figure-5"
F1 = "The paper gives F1 here, we the accuracy of the sign; on such data they are close."
FILES = (
    "The features can't be passed on; with the published files below `$DMD_DATA` the command makes "
    "the record."
)
SMALL = (
    "Data and budget are small; all methods have about DMD's number of weights, but on the wider "
    "features of the utterances up to twice as many."
)
OPEN_HEADS = (
    "Our heads are trained by a task loss of their own in every row; the paper does not say what "
    "trains its."
)

GROUPS: dict[str, list[Claim]] = {
    "Against other methods": [
        Claim(
            "DMD beats the other methods on aligned clips",
            "Abstract, Sec. 4.1, Table 1",
            "On CMU-MOSI with aligned sequences DMD has the best accuracy of all methods compared.",
            OTHERS,
            m.against({**paper.gains(paper.MOSI), **paper.gains(paper.MOSI_BERT)}, m.ALIGNED),
            TABLE1,
            SMALL + " MISA and FDMER had BERT features in the paper.",
        ),
        Claim(
            "DMD beats the other methods on unaligned clips",
            "Abstract, Sec. 4.1, Table 1",
            "The same where each modality keeps a clock of its own.",
            OTHERS,
            m.against(paper.gains(paper.MOSI_UNALIGNED), m.UNALIGNED),
            TABLE1,
            SMALL,
        ),
        Claim(
            "DMD beats the methods that disentangle features",
            "Sec. 4.1",
            "Consistent gains over MFM, MISA and FDMER, credited to the GD-Units.",
            OTHERS,
            m.against(
                {
                    k: (paper.gains(paper.MOSI) | paper.gains(paper.MOSI_BERT))[k]
                    for k in ("mfm", "misa", "fdmer")
                },
                m.ALIGNED,
            ),
            TABLE1,
            "A gain over another whole method would not show that the GD-Units cause it.",
        ),
        Claim(
            "DMD beats the methods with crossmodal transformers",
            "Sec. 4.1",
            "Consistent gains over MulT, PMR and, on unaligned clips, MICA.",
            OTHERS,
            m.each(
                m.against({k: paper.gains(paper.MOSI)[k] for k in ("mult", "pmr")}, m.ALIGNED),
                m.against(
                    {k: paper.gains(paper.MOSI_UNALIGNED)[k] for k in ("mult", "pmr", "mica")},
                    m.UNALIGNED,
                ),
            ),
            TABLE1,
            "PMR, MICA and FDMER have no public code; ours are partly inferred.",
        ),
        Claim(
            "Graph-MFN falls far behind",
            "Sec. 4.1, Table 2",
            "Graph-MFN suffers from the gap between modalities, which DMD's decoupling bridges.",
            OTHERS,
            m.against({"graph_mfn": paper.gains(paper.MOSEI)["graph_mfn"]}, (*m.ALIGNED, "mosei")),
            TABLE1,
            "The reported distance is that on CMU-MOSEI. Its cause is not tested.",
        ),
        Claim(
            "DMD beats the other methods on CMU-MOSEI",
            "Abstract, Sec. 4.1, Table 2",
            "DMD is best on ten times as many clips, aligned and unaligned.",
            OTHERS,
            m.each(
                m.against(
                    {**paper.gains(paper.MOSEI), **paper.gains(paper.MOSEI_BERT)},
                    ("mosei",),
                ),
                m.against(paper.gains(paper.MOSEI_UNALIGNED), ("mosei_unaligned",)),
            ),
            "python -m dmd study table2 --scale full --settings mosei mosei_unaligned",
            FILES,
        ),
        Claim(
            "DMD beats MISA and FDMER with BERT features",
            "Sec. 4.1, Tables 1 and 2",
            "With contextual word features DMD stays ahead.",
            OTHERS,
            m.each(
                m.against(paper.gains(paper.MOSI_BERT), ("mosi",)),
                m.against(paper.gains(paper.MOSEI_BERT), ("mosei",)),
            ),
            "python -m dmd study table1 --scale full --settings mosi",
            FILES,
        ),
    ],
    "The parts of DMD": [
        Claim(
            "Feature decoupling improves the prediction",
            "Sec. 4.2, Table 3",
            "Decoupling alone is a significant step up from a model with none of the parts.",
            PARTS,
            m.rows("table3", "decoupling", "nothing"),
            TABLE3,
            F1,
        ),
        Claim(
            "HomoGD adds to decoupling",
            "Sec. 4.2, Table 3",
            "A graph on the common features brings a further gain.",
            PARTS,
            m.rows("table3", "decoupling_homo", "decoupling"),
            TABLE3,
            F1,
            graphs=True,
        ),
        Claim(
            "HeteroGD without crossmodal attention harms",
            "Sec. 4.2, Table 3",
            "Distilling private features whose distributions differ makes the model worse.",
            PARTS,
            m.rows("table3", "decoupling_homo_hetero", "decoupling_homo", sign=-1),
            TABLE3,
            F1 + " The gain is the loss that the paper claims.",
        ),
        Claim(
            "Crossmodal attention is the key to HeteroGD",
            "Sec. 4.2, Table 3",
            "The multimodal transformer bridges the gap between private features.",
            PARTS,
            m.rows("table3", "dmd", "decoupling_homo_hetero"),
            TABLE3,
            F1 + " Attention takes most of the model's weights with it: a gain may be one of size.",
        ),
        Claim(
            "Attention and HeteroGD together improve DMD much",
            "Sec. 4.2, Table 3",
            "Private features, once attended and distilled, bring the largest step.",
            PARTS,
            m.rows("table3", "dmd", "decoupling_homo"),
            TABLE3,
            F1,
        ),
        Claim(
            "HeteroGD improves DMD behind attention",
            "Sec. 4.2, Table 3",
            "With attention in place, the second graph still adds.",
            PARTS,
            m.rows("table3", "dmd", "decoupling_homo_attention"),
            TABLE3,
            F1,
            graphs=True,
        ),
        Claim(
            "DMD improves on a model without its parts",
            "Sec. 4.2, Sec. 5",
            "The experiments show throughout that DMD's design works.",
            PARTS,
            m.rows("table3", "dmd", "nothing"),
            TABLE3,
            F1,
        ),
        Claim(
            "Distillation helps where modalities differ in reliability",
            "Abstract, Sec. 1, Sec. 5",
            "Passing reliable knowledge between unequal modalities makes recognition robust.",
            "12_ablations.ipynb#where-would-distillation-help",
            m.graphs_help,
            "python tools/conditions_map.py run",
            "A gap of 1 is the ordinary synthetic data: other modalities may be far less reliable "
            "than the best one of a clip. The paper has no row without both graphs.",
            graphs=True,
        ),
    ],
    "Each modality alone": [
        Claim(
            "Decoupling improves each modality",
            "Sec. 4.2, Table 4",
            "Each modality alone predicts better with decoupling than without.",
            EACH,
            m.contrasts(
                m.each_modality("FD"),
                (", bare model", "table3", "decoupling", "nothing"),
                (", whole model", "table4", "dmd", "no_decoupling"),
            ),
            TABLE4,
            OPEN_HEADS + " Nor what its baseline is, so we take two.",
        ),
        Claim(
            "Decoupling brings the modalities closer",
            "Sec. 4.2, Table 4",
            "The spread of accuracy over the three modalities falls.",
            EACH,
            m.contrasts(
                m.gap_closes,
                (", bare model", "table3", "decoupling", "nothing"),
                (", whole model", "table4", "dmd", "no_decoupling"),
            ),
            TABLE4,
            OPEN_HEADS,
        ),
        Claim(
            "HomoGD improves each modality, the weak ones most",
            "Abstract, Sec. 4.2",
            "Distillation makes vision and sound much better alone, and language a little.",
            EACH,
            m.contrasts(
                m.each_modality("HomoGD"),
                (", with decoupling only", "table3", "decoupling_homo", "decoupling"),
                (", whole model", "table4", "dmd", "no_homo"),
            ),
            TABLE4,
            OPEN_HEADS,
            graphs=True,
        ),
        Claim(
            "Language is the strongest modality",
            "Fig. 1, Sec. 1, Sec. 4.2",
            "Language alone does far better than vision or sound alone.",
            "02_the_data.ipynb#which-modality-tells-the-sentiment",
            m.alone({"heads": ("table3", "decoupling", "homo")}, m.language_leads),
            TABLE3,
            "The synthetic clips were built so; only the utterances are evidence.",
        ),
        Claim(
            "Attention lifts vision",
            "Sec. 4.2",
            "Behind crossmodal attention the visual modality alone tells far more than before it.",
            EACH,
            m.alone(
                {"homo": ("table3", "dmd", "homo"), "hetero": ("table3", "dmd", "hetero")},
                m.vision_rises,
            ),
            TABLE3,
            "Behind attention a visual head has read the words too: a rise is not the face's own.",
        ),
    ],
    "DMD and MulT": [
        Claim(
            "A GD-Unit improves MulT",
            "Sec. 4.2, Table 5",
            "Distillation helps a method that does not decouple, too.",
            ON_MULT,
            m.rows("table5", "mult_gd", "mult"),
            TABLE5,
            graphs=True,
        ),
        Claim(
            "DMD beats MulT with a GD-Unit",
            "Sec. 4.2, Table 5",
            "So features should be decoupled before they are distilled.",
            ON_MULT,
            m.rows("table5", "dmd", "mult_gd"),
            TABLE5,
            "The two differ in more than decoupling.",
        ),
        Claim(
            "DMD beats MulT",
            "Sec. 4.2, Table 5",
            "Decoupling and distillation together gain more than either alone.",
            ON_MULT,
            m.rows("table5", "dmd", "mult"),
            TABLE5,
            "The two differ in more than decoupling and distillation.",
        ),
    ],
    "Inside the model": [
        Claim(
            "Features come apart into shared and own",
            "Abstract, Sec. 1",
            "Two encoders put what modalities share and what is each one's own into two spaces.",
            "14_looking_inside.ipynb#the-scorecard",
            m.in_runs(m.decouples),
            OBJECTIVE,
            "Points are hundredths of the variance that a linear probe explains. Known factors "
            "exist on synthetic clips only.",
        ),
        Claim(
            "Decoupling reduces redundancy",
            "Sec. 3.1, Sec. 4.1, Sec. 4.2",
            "The decoupling losses, orthogonality above all, keep one part out of the other.",
            LEAKAGE,
            m.in_runs(m.less_redundant),
            OBJECTIVE,
            "Redundancy is what a linear probe reads of the wrong factors in a part, in hundredths "
            "of their variance. A part that forgets everything is not redundant either.",
        ),
        Claim(
            "The margin loss consolidates the decoupling",
            "Sec. 1, Sec. 3.1",
            "Keeping emotions apart across modalities sharpens the split.",
            LEAKAGE,
            m.in_runs(m.margin_consolidates),
            OBJECTIVE,
        ),
        Claim(
            "Distilled common features separate seven classes",
            "Sec. 4.2, Fig. 3",
            "Common features tell seven classes apart with the graphs, and hardly without.",
            "14_looking_inside.ipynb#a-picture-in-the-manner-of-figure-3",
            m.in_runs(m.seven_classes),
            OBJECTIVE,
            "The paper shows a picture; we count what heads on these features get right.",
            graphs=True,
        ),
        Claim(
            "Distilled private features separate the modalities",
            "Sec. 4.2, Fig. 4",
            "Private features cluster by modality, best with both graphs.",
            "14_looking_inside.ipynb#clumps-for-nothing",
            m.not_tested,
            "pytest --nbmake book/14_looking_inside.ipynb",
            "No record keeps these features. The command runs the chapter, which measures three "
            "models of one seed, and finds the modalities apart before any training.",
        ),
        Claim(
            "HomoGD's edges lead from language",
            "Sec. 4.2, Fig. 5",
            "On common features language teaches vision and sound, and other edges are weak.",
            EDGES,
            m.in_runs(m.edges("homo", [(0, 1), (0, 2)])),
            OBJECTIVE,
            "Points are hundredths of a clip's weight, of which an even edge has a sixth. Trained "
            "as the paper prints it, without the fixed prior of the published code.",
        ),
        Claim(
            "HeteroGD's edges lead from language, and from vision to sound",
            "Sec. 4.2, Fig. 5",
            "On private features a third strong edge appears, from vision to sound.",
            EDGES,
            m.in_runs(m.edges("hetero", [(0, 1), (0, 2), (1, 2)])),
            OBJECTIVE,
            "As for HomoGD's.",
        ),
        Claim(
            "Edges adapt to the clip",
            "Abstract, Sec. 1",
            "The model learns for each example who should teach whom.",
            "07_homogd.ipynb#does-the-graph-trust-whom-it-should",
            m.in_runs(m.adaptive),
            OBJECTIVE,
            "A modality's share of the teaching where it is the most reliable, less its share "
            "elsewhere.",
        ),
    ],
}
CLAIMS = [claim for group in GROUPS.values() for claim in group]
