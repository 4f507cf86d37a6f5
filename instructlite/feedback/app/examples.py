"""Prompts to try, by the use cases of InstructGPT (Ouyang et al. 2022, table 1)."""

EXAMPLES = (
    ("Generation", "Write a short story about a lighthouse keeper who finds a letter in a bottle."),
    ("Open QA", "Why is the sky blue?"),
    ("Brainstorming", "List five ideas for a birthday present for a friend who likes the outdoors."),
    ("Chat", "I have a job interview tomorrow and I am nervous. What should I do tonight?"),
    ("Rewrite", "Rewrite this politely: Send me the report now, you are late again."),
    (
        "Summarization",
        "Summarize in one sentence: The town council met on Monday. It agreed to repair the old bridge, which has been closed since "
        "the flood in March, and to pay for it from this year's budget. Work begins in June.",
    ),
    ("Classification", "Is this review positive or negative? Answer with one word. Review: The soup was cold and nobody came for an hour."),
    (
        "Closed QA",
        "Answer from the text only. Text: The museum opens at ten and closes at six; on Fridays it stays open until eight. "
        "Question: How long is it open on a Friday?",
    ),
    ("Extract", "List all names of people in this text: Ann met Bob at the station, and together they called on Professor Carter."),
    ("Other", "Find the bug: for i in range(10) print(i)"),
)
