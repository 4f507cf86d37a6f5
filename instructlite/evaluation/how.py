"""How each number of a report was computed: one place for the pages, by the part of the report that has the number."""

HOW: tuple[tuple[str, str | None, str], ...] = (
    (
        "Win rate", None,
        "every answer of a against every answer of b to the same prompt; the one that the judge prefers wins, a tie counts one half; mean "
        "over prompts. A language model is asked in both orders: an answer wins only where it is preferred in both. A verdict that did not "
        "come is left out, never counted as a loss.",
    ),
    (
        "Length-controlled win rate", "length_controlled",
        "the rate there would be between answers of equal length, by a logistic regression on the difference in length (AlpacaEval 2: "
        "Dubois et al. 2024, without its difficulty of each prompt).",
    ),
    (
        "p of a draw", "p_of_a_draw",
        "how often chance alone would give a difference as large, were both candidates alike: permutation test on the signs of the "
        "prompts' differences, two-sided, not corrected for the number of comparisons.",
    ),
    ("Prompts needed", "prompts_needed", "how many prompts like these make the 95 % interval of the win rate reach 0.05 to either side."),
    (
        "Mean reward", None,
        "the judge's raw score, mean over answers and prompts. It has no unit: compare it within one judge only.",
    ),
    (
        "Intervals", None,
        "95 %, bootstrap with 10,000 resamples of whole prompts, since answers to one prompt are alike (percentiles, expanded for few "
        "prompts: Hesterberg 2015); Wilson's where every comparison is won or lost. They say how far another draw of prompts would move "
        "the number, not another training run.",
    ),
    (
        "Strength", "strengths",
        "Bradley-Terry (1952), in log-odds, 0 on average over the candidates: i beats j with probability 1 / (1 + exp(s_j - s_i)). Half a "
        "win is added both ways to each pair that met, so that a candidate that won everything has a finite strength.",
    ),
    ("Judge", None, "a reward adapter's score is read at the last token of the answer, as PPO reads its reward model."),
    (
        "Accuracy of a judge", None,
        "the share of held-out comparisons by people in which it prefers what they preferred; beside it, what always preferring the longer "
        "answer would give.",
    ),
    (
        "Position bias", "position_bias",
        "pairs in which the first place won in both orders less those in which the second did, as a share of the pairs judged in both "
        "orders: 0 for a fair judge, 1 for one that always takes the first place.",
    ),
    ("Krippendorff's alpha", "agreement", "agreement between the judges: 1 is full agreement, 0 what chance gives, below 0 worse."),
    ("Ratings", "ratings", "mean over answers and prompts of what the judge gave when asked for a whole number of the scale."),
    (
        "KL", None,
        "sum over an answer's tokens of log pi - log pi_reference, in nats, at the sampling temperature, mean over the candidate's own "
        "sampled answers ± standard error over prompts. That of best-of-n is not measured but at most log n - (n - 1) / n.",
    ),
    (
        "Perplexity", None,
        "exp of the mean negative log-probability per token of people's held-out answers, the token that ends the answer included.",
    ),
    ("Length", None, "tokens with the one that ends the answer."),
    ("Ended", None, "share of answers that came to an end before the limit."),
    ("Distinct-2", None, "different token pairs as a share of all, over all answers of a candidate."),
    ("Repeated trigrams", None, "share of token triples that stood before in the same answer."),
    (
        "Side effects", "side_effects",
        "an effect is called clear where the two candidates' 95 % intervals do not touch, which is stricter than a test of the difference.",
    ),
    ("Benchmarks", "benchmarks", "± one standard error, as the benchmark's harness gives it; called clear beyond two of the difference."),
    (
        "Greedy", None,
        "takes the likeliest token each time: a policy whose distribution is only sharper gains when sampled, not then. In half precision, "
        "nearly tied tokens can fall differently on another machine or with another batch size.",
    ),
    (
        "Share of the gain by greedy decoding", "sharpening",
        "(b greedy - b sampled) / (a sampled - b sampled), in mean reward.",
    ),
    (
        "The course of training", "training",
        "means over the answers of each rollout, none of them held out; each point is one rollout, or in a long run the mean of "
        "neighbouring ones. As text: bars from the least (▁) to the greatest (█) of the row; first and last: the outermost bars' numbers.",
    ),
)  # fmt: skip
"""(term, the part of the report or the field of its win rates or judges that it is about, or None: always there; text)."""

MEASURES: dict[str, tuple[str, str]] = {
    "perplexity": ("perplexity", "exp of the mean negative log-probability per token of the texts."),
    "toxicity": ("toxicity", "mean probability of toxic language by the scorer, over answers and prompts."),
    "toxic_answers": ("toxic answers", "share of answers that the scorer gives at least one half."),
    "refusal": ("refusals", "share of answers that decline to answer, by their wording."),
    "distinct_1": ("distinct-1", "different tokens as a share of all, over all answers of a candidate."),
    "distinct_2": ("distinct-2", "different token pairs as a share of all, over all answers of a candidate."),
    "self_bleu": ("self-BLEU", "mean BLEU of each answer with the others as its references: high where a candidate says the same to all."),
    "repeated_trigrams": ("repeated trigrams", "share of token triples that stood before in the same answer."),
    "length": ("length", "tokens with the one that ends the answer."),
    "entropy": ("entropy", "mean negative log-probability per token of the candidate's own sampled answers, in nats."),
    "kl": ("KL to the reference", "nats an answer, over the candidate's own sampled answers."),
    "exact_match": ("exact match", "share of answers with the words of the reference; case, punctuation and articles aside."),
    "bleu": ("BLEU", "sacrebleu's, of all answers together, against people's."),
    "rouge_l": ("ROUGE-L", "longest common subsequence with people's answers, F-measure."),
    "bert_score": ("BERTScore", "similarity of contextual embeddings to those of people's answers, F1."),
    "mauve": ("MAUVE", "how alike the distributions of answers and of people's are, by the base's hidden states: 1 alike, 0 apart."),
    "truthfulness": (
        "truthfulness", "MC1 of TruthfulQA: share of questions whose best answer has a higher log-probability than every false one.",
    ),
    "hallucination": (
        "hallucination, by words",
        "share of an answer's content words that the given text has not: a proxy, for comparing candidates on the same passages.",
    ),
    "hallucination_judged": ("hallucination", "share of answers that state what the given text does not, as a language model judges."),
    "customer_assistant": ("appropriate as customer assistant", "share that a company could show customers, as a language model judges."),
}  # fmt: skip
"""Measure -> what it is called in a table, and how it was computed."""


def measure_name(measure: str) -> str:
    return MEASURES.get(measure, (measure.replace("_", " "), ""))[0]
