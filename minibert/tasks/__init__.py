"""What a BERT is used for: labelled data read and encoded, predictions judged and turned into entities and answers,
texts made vectors.

    train = read_texts("reviews.csv", "classify")              # examples.py; columns.py says which column is what
    names = train.label_names()                                # labels.py
    encoded = encode_texts(tokenizer, train.texts, train.pairs, max_seq_length=128)  # encoding.py
    targets = train.targets(names)
    figures, report = class_metrics(targets, predicted, names) # metrics.py; picture.py draws the confusion matrix

    sentences = read_words("train.conll")                      # words.py: CoNLL, CoNLL-U, JSON lines
    entities(tags, sentence.spans, sentence.text)              # tags.py
    questions = read_questions("train-v2.0.json")              # questions.py: SQuAD
    answers_from(windows, contexts, start_logits, end_logits)  # answers.py

    for kind, record in FineTuning(model, task, *data, tokenizer, config, "output").run(): ...  # finetune.py, task.py
    task = Embed.of(read_texts("pairs.csv", "embed"), "folder") # embedding_task.py: the same, of texts that are alike
    for trial in Search("folder", space, "eval_accuracy").trials(20): ...  # search.py, space.py: the best settings
    pipeline("output")(["a text"])                             # pipeline.py, predictions.py

    encoder = SentenceTransformer.from_pretrained("folder")    # sentences.py: texts to vectors, and how alike they are
    fill_mask(load_masked_lm("folder"), tokenizer, "A [MASK].") # fill_mask.py: the likeliest words in place of masks

Rows of any file come from tables.py. A file or a row that does not fit is a UserError that names the file and the line.
"""

from minibert.tasks.answers import AnswerPrediction, Candidate, answers_from
from minibert.tasks.columns import Columns, find_columns
from minibert.tasks.embedding_task import Embed
from minibert.tasks.encoding import EncodedTexts, EncodedWords, Windows, encode_questions, encode_texts, encode_words
from minibert.tasks.examples import TextExample, TextExamples, read_texts, stream_texts
from minibert.tasks.fill_mask import fill_mask, fill_masks, load_masked_lm
from minibert.tasks.finetune import FineTuning, FineTuningConfig, evaluate, load_model, predict
from minibert.tasks.labels import LabelIds, class_ids, class_sets, names_of, sorted_names
from minibert.tasks.metrics import (
    Scores,
    answer_metrics,
    best_null_threshold,
    by_group,
    class_metrics,
    confusion_matrix,
    group_report,
    multi_label_metrics,
    regression_metrics,
    search_metrics,
    similarity_metrics,
    tag_metrics,
)
from minibert.tasks.picture import draw_confusion_matrix
from minibert.tasks.pipeline import Pipeline, pipeline
from minibert.tasks.questions import Answer, Question, QuestionExamples, read_questions
from minibert.tasks.search import Search, Trial
from minibert.tasks.sentences import SentenceTransformer
from minibert.tasks.space import Among, Between, read_space, usual_space
from minibert.tasks.tables import Table, open_table
from minibert.tasks.tags import Entity, entities, to_iob2, word_tags
from minibert.tasks.task import Classify, Prepared, Tag, Task
from minibert.tasks.words import Sentence, WordExamples, read_words, stream_words

__all__ = [
    "Among",
    "Answer",
    "AnswerPrediction",
    "Between",
    "Candidate",
    "Classify",
    "Columns",
    "Embed",
    "EncodedTexts",
    "EncodedWords",
    "Entity",
    "FineTuning",
    "FineTuningConfig",
    "LabelIds",
    "Pipeline",
    "Prepared",
    "Question",
    "QuestionExamples",
    "Scores",
    "Search",
    "Sentence",
    "SentenceTransformer",
    "Table",
    "Tag",
    "Task",
    "TextExample",
    "TextExamples",
    "Trial",
    "Windows",
    "WordExamples",
    "answer_metrics",
    "answers_from",
    "best_null_threshold",
    "by_group",
    "class_ids",
    "class_metrics",
    "class_sets",
    "confusion_matrix",
    "draw_confusion_matrix",
    "encode_questions",
    "encode_texts",
    "encode_words",
    "entities",
    "evaluate",
    "fill_mask",
    "fill_masks",
    "find_columns",
    "group_report",
    "load_masked_lm",
    "load_model",
    "multi_label_metrics",
    "names_of",
    "open_table",
    "pipeline",
    "predict",
    "read_questions",
    "read_space",
    "read_texts",
    "read_words",
    "regression_metrics",
    "search_metrics",
    "similarity_metrics",
    "sorted_names",
    "stream_texts",
    "stream_words",
    "tag_metrics",
    "to_iob2",
    "usual_space",
    "word_tags",
]
