"""What the tokenizer of caption metrics takes as one token: words, abbreviations, numbers, addresses, marks.

The tokens are those of the Penn Treebank, as Stanford's PTBTokenizer 3.4.1 makes them, with which published
captioning figures are made. Each pattern was held against its output (tests/eval/test_caption_metrics.py).

A rule takes `token`, where `after` comes next. The rule that reaches furthest wins, counting what comes
after; of several that reach as far, the first. Python's `re` tries one way after the other, so patterns
are written such that their first match is their longest.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

Made = Callable[[str], str]  # the token as it is counted, from the text as it stands; "": none


class Rule(NamedTuple):
    """pattern: its first group is the token, the second what comes after it."""

    pattern: re.Pattern[str]
    made: Made


def kept(text: str) -> str:
    return text


def dropped(text: str) -> str:
    return ""


def rule(token: str, made: Made = kept, after: str = "") -> Rule:
    return Rule(re.compile(f"({token})({after})"), made)


def letters() -> str:
    """All letters of the basic plane, as the inside of a character class."""
    numbers = [n for n in range(0x10000) if unicodedata.category(chr(n))[0] == "L"]
    runs = (list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]))
    return "".join(f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs)


def either(words: str) -> str:
    """Any of the words, in any case, the longest first."""
    listed = sorted(words.split(), key=lambda word: (-len(word), word))
    return f"(?i:{'|'.join(map(re.escape, listed))})"


def capital(words: str) -> str:
    """Any of the words, the first letter as given, the others in any case."""
    return f"(?:{'|'.join(word[0] + either(word[1:]) if word[1:] else word for word in words.split())})"


# Characters.

L = letters()
# Combining accents and letter-like signs of other scripts go on a word as letters do; so does a soft hyphen.
ACCENTS = (
    "\\u00ad\\u02c2-\\u02c5\\u02d2-\\u02df\\u02e5-\\u036f\\u0375\\u0378-\\u0379\\u0384-\\u0385\\u03f6"
    "\\u0483-\\u0487\\u055a-\\u055f\\u0591-\\u05bd\\u05bf\\u05c1-\\u05c2\\u05c4-\\u05c5\\u05c7"
    "\\u0615-\\u061a\\u064b-\\u065e\\u0670\\u06d6-\\u06e4\\u06e7-\\u06ed\\u06fd-\\u06fe\\u070f\\u0711"
    "\\u0730-\\u074c\\u07a6-\\u07b0\\u07eb-\\u07f3\\u0900-\\u0903\\u093c\\u093e-\\u094e\\u0951-\\u0955"
    "\\u0962-\\u0963\\u0981-\\u0983\\u09bc\\u09be-\\u09c4\\u09c7-\\u09c8\\u09cb-\\u09cd\\u09d7"
    "\\u09e2-\\u09e3\\u0a01-\\u0a03\\u0a3c\\u0a3e-\\u0a4f\\u0a81-\\u0a83\\u0abc\\u0abe-\\u0acf\\u0b82"
    "\\u0bbe-\\u0bc2\\u0bc6-\\u0bc8\\u0bca-\\u0bcd\\u0c01-\\u0c03\\u0c3e-\\u0c56\\u0d3e-\\u0d44"
    "\\u0d46-\\u0d48\\u0e31\\u0e34-\\u0e3a\\u0e47-\\u0e4e\\u0eb1\\u0eb4-\\u0ebc\\u0ec8-\\u0ecd"
)
LETTER = f"(?:[{L}{ACCENTS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"  # or the entity of one
BLANKS = " \\t\\u00a0\\u2000-\\u200a\\u3000"
GAP = f"[{BLANKS}\\n]"
PAUSE = "[,;:\\u3001]"
APOSTROPHE = "(?:['\\x92\\u2019]|(?i:&apos;))"
INNER_QUOTE = f"(?:{APOSTROPHE}|[`\\x91\\u2018\\u201b])"  # as it is written inside of words, too
ENDS = "[^A-Za-z]"


# Words, and what is split off them.

PART = f"{LETTER}(?:{LETTER}|\\d)*"
WORD = f"{PART}(?:[.!?]{PART})*"
NOT = f"(?i:n){INNER_QUOTE}(?i:t)"
CLITIC = f"{APOSTROPHE}(?:[msdMSD]|{either('re ve ll')})"
ELIDED = f"(?:[dDoOlL]{INNER_QUOTE}[{L}\\d])?[{L}\\d]+"  # d'Avignon
HYPHENED = f"{ELIDED}(?:[-_\\u058a\\u2010\\u2011]{ELIDED})*"
INITIALS = f"(?:{either('u.s.-u.s.s.r u.s.-u.k')}|{either('canada sino korean eu japan non')}-{either('u.s')}"
INITIALS += "|[A-Za-z](?:\\.[A-Za-z])+)"
HYPHENED_ASCII = f"[A-Za-z0-9][A-Za-z0-9.,\\u00ad]*(?:-(?:{INITIALS}\\.|[A-Za-z0-9\\u00ad]+))+"
SIDE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of a slash
FIRM = "[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+"


def without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def with_ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


SINGLE = dict.fromkeys("\x91\u2018\u201b\u2039", "`") | dict.fromkeys("\x92\u2019\u203a", "'")
DOUBLE = dict.fromkeys("\x93\u201c\xab", "``") | dict.fromkeys("\x94\u201d\xbb", "''")
QUOTES = str.maketrans(SINGLE | DOUBLE)


def with_ascii_quotes(text: str) -> str:
    return text.replace("&apos;", "'").translate(QUOTES)


WORDS = (
    rule("(?i:can)", after="(?i:not)"),
    rule("(?i:gon|wan)", after="(?i:na)"),
    rule("(?i:got)", after="(?i:ta)"),
    rule("(?i:gim|lem)", after="(?i:me)"),
    rule("'(?i:t)", after="(?i:is|was)"),
    rule(WORD, without_soft_hyphens, after=CLITIC),
    rule("[A-Za-z\\u00ad]*[A-MO-Za-mo-z]\\u00ad*", without_soft_hyphens, after=NOT),
    rule(WORD, without_soft_hyphens),
    # Words with an apostrophe that is part of them.
    rule(f"{APOSTROPHE}(?i:n){APOSTROPHE}?"),
    rule(f"{APOSTROPHE}(?:{either('em til till cause')}|[2-9]0(?i:s))"),
    rule(f"(?:{either('dunkin somethin ol l d j')}){APOSTROPHE}"),
    rule(f"(?i:y){APOSTROPHE}", after=f"[{L}]"),
    rule(f"[A-HJ-XZn]{INNER_QUOTE}[{L}]{{2,}}"),
    rule(f"[{L}]+[aeiouyAEIOUY]{INNER_QUOTE}[aeiouA-Z][{L}]*"),
    rule(f"(?i:o){INNER_QUOTE}(?i:o)|(?i:cap){APOSTROPHE}(?i:n)|(?i:c){APOSTROPHE}(?i:est)"),
    rule(either("c'mon cont'd cont'd. e'er ev'ry li'l nat'l nor'easter s'mores")),
    rule(CLITIC, with_ascii_quotes, after=ENDS),
    rule(NOT, with_ascii_quotes, after=ENDS),
    # Words with a mark that is part of them.
    rule(either("c++ c# f# c.d.s pro- anti- -lrb- -rrb- -lcb- -rcb- -lsb- -rsb-")),
    rule("(?i:s(?:&amp;|&)(?:p-500|ls))", with_ampersand),
    rule(f"{SIDE}\\\\?/{SIDE}(?:\\\\?/{SIDE})?"),
    rule(f"@[a-zA-Z_][a-zA-Z_0-9]*|#{LETTER}+"),
)

# Abbreviations, that keep their period.

DATES = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
PLACES = "ala ariz calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn"
PLACES += " va vt wis wisc wyo blvd rd bldg"
CAPITAL_PLACES = "Az Ark Del Ill La Mass Miss Ore Pa Tex Wash"  # otherwise words
COMPANIES = "inc co cos corp ltd plc rt bancorp bhd assn univ intl sys"
OTHERS = "al bros ed.d esq est etc ext jr ph.d seq sq sr tel"
TITLES = (
    "adj adm adv assoc asst atty attys ave brig capt cmdr col comdr cpl det dr drs ens ft gen gov govs hon "
    "insp lieut lt maj messrs mlle mme mr mrs ms msgr mt pfc pres prof profs pvt rep reps rev sen sens sfc "
    "sgt spc st ste supt supts"
)
TITLES += " a.k.a alex cf cie dept elec invt jos natl ph treas vs wm"
COUNTED = "art arts bldg ca fig figs no nos op pp prop"  # only before numbers
# Before these words, a single letter with a period is the end of a sentence.
STARTS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More "
    "Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There These They This We When "
    "While What Yet You"
)
NAME = "[A-Za-z][A-Za-z0-9:._-]*"
VALUE = f"(?:'[^'\\n]*'|\"[^\"\\n]*\"|{NAME})"
TAG = f"<(?:[!?][A-Za-z-][^>\\n]*|/{NAME} *|{NAME}(?: +{NAME}(?: *= *{VALUE})?)* */? *)>"

ABBREVIATIONS = (
    rule("[A-Za-z]", after=f"\\.{GAP}+(?:{capital(STARTS)}|{TAG}){GAP}"),
    rule(f"{either(COUNTED)}\\.", after=f"{GAP}?\\d"),
    rule(f"(?:{either(f'{DATES} {PLACES} {COMPANIES} {OTHERS}')})\\.", after="(?s:..)"),
    rule(f"(?:{capital(CAPITAL_PLACES)}|[Pp][Pp]?[Tt][ey][Ss]?)\\.", after="(?s:..)"),
    rule("(?i:pte)\\.", after=f"[{BLANKS}](?i:ltd|lim)"),
    rule(f"(?:{INITIALS}|{either(TITLES)}|{capital('Miss')}|[Mm][ft][Gg]|[A-Za-z])\\."),
    rule(INITIALS, after=GAP),
)


# Names of files and words with hyphens and such.

FILE_TYPES = (
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt "
    "ps py sql tar txt wav x xml zip"
)

COMPOUNDS = (
    rule(f"(?:{LETTER}|\\d)+(?:\\.(?:{LETTER}|\\d)+)*\\.{either(FILE_TYPES)}", after=f"(?:{GAP}|[.?!,])"),
    # Before a comma the period stays.
    *(
        rule(word + period, made, after)
        for word, made in (
            (WORD, without_soft_hyphens),
            (HYPHENED_ASCII, without_soft_hyphens),
            (HYPHENED, kept),
            (FIRM, with_ampersand),
        )
        for period, after in (("\\.", PAUSE), ("", ""))
    ),
)


# Numbers.

NUMBER = "(?:\\d*(?:[.:,\\u00ad\\u066b\\u066c]\\d+)+|\\d+)"  # and times
FRACTION = "(?:\\d{1,4}[- \\u00a0])?\\d{1,4}(?:\\\\?/|\\u2044)\\d{1,4}"
AREA = "(?:\\([0-9]{2,3}\\)[ \\u00a0]?|(?:\\+\\+?)?(?:[0-9]{2,4}[- \\u00a0]){1,2})"
DOTTED = "(?:(?:\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}"
SIGNS = "[\\u207a\\u207b\\u208a\\u208b]"
SUPERSCRIPTS, SUBSCRIPTS = "[\\u2070\\u00b9\\u00b2\\u00b3\\u2074-\\u2079]+", "[\\u2080-\\u2089]+"
SPELT = str.maketrans({"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
MONEY = str.maketrans({"¢": "cents", "£": "#"} | dict.fromkeys("\x80¤₠€", "$"))


def in_one(text: str) -> str:
    """Blanks inside are no-break spaces, so that the token stays one."""
    return text.replace(" ", "\u00a0")


def with_named_parentheses(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


NUMBERS = (
    rule("\\d{1,2}[-/]\\d{1,2}[-/]\\d{2,4}"),
    rule(f"[-+]?{NUMBER}", without_soft_hyphens),
    rule(f"{SIGNS}?(?:{SUPERSCRIPTS}|{SUBSCRIPTS})"),
    rule(FRACTION, in_one),
    rule("[¼-¾⅓-⅞]", lambda text: text.translate(SPELT)),
    rule("[A-Z]*\\$|#"),
    rule("[\\x80¢-¥\\u060b\\u0e3f₠₤€\\uffe0\\uffe1\\uffe5\\uffe6]", lambda text: text.translate(MONEY)),
    rule(f"{APOSTROPHE}[0-9][0-9]", after=GAP),
    rule(f"{AREA}[0-9]{{3,4}}[- \\u00a0]?[0-9]{{3,5}}", lambda text: with_named_parentheses(in_one(text))),
    rule(DOTTED),
)


# Addresses.

OUTSIDE = ' \\t\\n\\f\\r"<>|'  # never part of one
LAST = f"[^{OUTSIDE}.!?(){{}},-]"
PATH = f"/[^{OUTSIDE}()]+{LAST}"
LABEL = f"[^{OUTSIDE}.!?(){{}},]+\\."
LOWER_LABEL = f"[^{OUTSIDE}`'.!?(){{}},-_$]+\\."  # from the comma to the low line, no capitals and digits
MAIL_PART = f"[^{OUTSIDE}(){{}}.\\u00a0]+"

ADDRESSES = (
    rule(f"(?i:https?)://[^{OUTSIDE}(){{}}]+{LAST}"),
    rule(f"(?i:www)\\.(?:{LABEL})+[a-zA-Z]{{2,4}}"),
    rule(f"(?:{LOWER_LABEL})+{either('com net org edu')}"),
    rule(f"(?:(?i:www)\\.(?:{LABEL})+?[a-zA-Z]{{2,4}}|(?:{LOWER_LABEL})+?{either('com net org edu')}){PATH}"),
    rule(
        f"(?:<|(?i:&lt;))?[a-zA-Z0-9][^{OUTSIDE}(){{}}\\u00a0]*@(?:{MAIL_PART}\\.)*{MAIL_PART}(?:>|(?i:&gt;))?"
    ),
    rule(TAG, in_one),
)


# Marks.

BRACKETS = {"[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-", "(": "-LRB-", ")": "-RRB-"}
EYES, MOUTH = "[<>]?[:;=]", "[()DPdpO\\\\{@|\\[\\]]"
SIDEWAYS = "-x^=~<>'"  # eyes of faces that need no turned head
FACES = (
    f"[{SIDEWAYS}]_[{SIDEWAYS}]|\\([{SIDEWAYS}][_.]?[{SIDEWAYS}]\\)|\\([{SIDEWAYS[1:]}]-[{SIDEWAYS[1:]}`]\\)"
    f"|[\\^x=~<>]\\.\\[\\^(?i:x)=[^<]*<>\\]"
)
PERIODS = ".\\u00a1\\u00bf\\u037e\\u0589\\u061f\\u06d4\\u0700-\\u0702\\u07fa\\u3002"
SYMBOLS = (
    "+%&~^|\\\\\\u00a6-\\u00a9\\u00ac\\u00ae-\\u00b8\\u00ba\\u00d7\\u00f7\\u0387\\u05be\\u05c0\\u05c3\\u05c6"
    "\\u05f3\\u05f4\\u0600-\\u0603\\u0606-\\u060a\\u060c\\u0614\\u061b\\u061e\\u066a\\u066d\\u0703-\\u070d"
    "\\u07f6-\\u07f8\\u0964\\u0965\\u0e4f\\u1fbd\\u2016\\u2017\\u2020-\\u2023\\u2030-\\u2038\\u203b"
    "\\u203e-\\u2042\\u2044\\u207a-\\u207f\\u208a-\\u208e\\u2100-\\u214f\\u2190-\\u2bff\\u3012\\u30fb"
    "\\uff01-\\uff0f\\uff1a-\\uff20\\uff3b-\\uff40\\uff5b-\\uff65"
)
ENTITIES = "ht tl ur lr qc ql qr odq cdq"  # of newswire, kept as they are

MARKS = (
    rule(f"&{either('md mdash ndash')};|[\\x96\\x97\\u2013-\\u2015]", dropped),
    rule("(?i:&amp;)", with_ampersand),
    rule(f"&(?:{either(ENTITIES)}|#[0-9]+);"),
    rule('"|&quot;', dropped),
    rule("(?i:&quot;)"),
    rule("<|(?i:&lt;)", lambda text: "<"),
    rule(">|(?i:&gt;)", lambda text: ">"),
    rule("<<|>>"),
    rule(f"{EYES}[-o*']?{MOUTH}", with_named_parentheses, after="[^A-Za-z0-9]"),
    rule(FACES, with_named_parentheses),
    rule("[][{}()]", lambda text: BRACKETS[text]),
    rule("-{5,}"),
    rule("-{1,4}", dropped),
    rule("\\.{3,5}|(?:\\.[ \\u00a0]){2,4}\\.|[\\x85\\u2026]", dropped),
    rule("@+|#+|_+|\\*+|(?:\\\\\\*){1,3}|[?!]+|[=/]"),
    rule(PAUSE),
    rule(f"[{PERIODS}]"),
    rule("'", dropped, after="[A-Za-z][^ \\t\\n\\u00a0]"),
    rule(CLITIC, with_ascii_quotes),
    rule("''|[`\\u2018-\\u201f\\x91-\\x94\\u2039\\u203a\\u00ab\\u00bb]{1,2}", with_ascii_quotes),
    rule(APOSTROPHE, with_ascii_quotes),
    rule(f"[{SYMBOLS}]"),
    rule(f"[{BLANKS}]+|[\\x00\\x7f\\u200b\\u200e\\u200f\\ufeff\\n]|(?i:&nbsp;)", dropped),
)

RULES = (*WORDS, *ADDRESSES, *NUMBERS, *ABBREVIATIONS, *COMPOUNDS, *MARKS)
