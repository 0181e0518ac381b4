"""What a BERT is used for: labelled data read and encoded.

    train = read_texts("reviews.csv", "classify")              # examples.py; columns.py says which column is what
    names = train.label_names()                                # labels.py
    encoded = encode_texts(tokenizer, train.texts, train.pairs, max_seq_length=128)  # encoding.py
    targets = train.targets(names)

    sentences = read_words("train.conll")                      # words.py: CoNLL, CoNLL-U, JSON lines
    questions = read_questions("train-v2.0.json")              # questions.py: SQuAD

Rows of any file come from tables.py. A file or a row that does not fit is a UserError that names the file and the line.
"""

from minibert.tasks.columns import Columns, find_columns
from minibert.tasks.encoding import EncodedTexts, EncodedWords, Windows, encode_questions, encode_texts, encode_words
from minibert.tasks.examples import TextExample, TextExamples, read_texts, stream_texts
from minibert.tasks.labels import LabelIds, class_ids, class_sets, names_of, sorted_names
from minibert.tasks.questions import Answer, Question, QuestionExamples, read_questions
from minibert.tasks.tables import Table, open_table
from minibert.tasks.words import Sentence, WordExamples, read_words, stream_words

__all__ = [
    "Answer",
    "Columns",
    "EncodedTexts",
    "EncodedWords",
    "LabelIds",
    "Question",
    "QuestionExamples",
    "Sentence",
    "Table",
    "TextExample",
    "TextExamples",
    "Windows",
    "WordExamples",
    "class_ids",
    "class_sets",
    "encode_questions",
    "encode_texts",
    "encode_words",
    "find_columns",
    "names_of",
    "open_table",
    "read_questions",
    "read_texts",
    "read_words",
    "sorted_names",
    "stream_texts",
    "stream_words",
]
