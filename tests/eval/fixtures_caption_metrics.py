"""Captions, plain and odd, and the tokens that Java's tokenizer makes of them."""

from __future__ import annotations

import random
from pathlib import Path

from flamingo.eval.benchmarks import Example, Prediction

ODD = [  # captions, and the tokens that PTBTokenizer 3.4.1 and pycocoevalcap make of them
    ("I don't know.", "i do n't know"),
    ("You cannot, and can't!", "you can not and ca n't"),
    ("He's gonna wanna go; gotta run", "he 's gon na wan na go got ta run"),
    ("Lemme see, gimme that.", "lem me see gim me that"),
    ("'Tis and 'twas, y'all o'clock ma'am", "'t is and 't was y' all o'clock ma'am"),
    ("they've, we'll, I'm, she'd, it's, dogs'", "they 've we 'll i 'm she 'd it 's dogs"),
    ("ain't isn't shan't won't", "ai n't is n't sha n't wo n't"),
    ('a "red" bus \'stop\' sign', 'a red bus stop sign'),
    ('“curly” ‘quotes’ and don’t, it’s', "curly quotes and do n't it 's"),
    ("the '80s and '08 and 1990's and 5's", "the '80s and '08 and 1990 's and 5 's"),
    ("rock'n'roll fish 'n' chips", "rock 'n' roll fish 'n' chips"),
    ("l'eau d'Avignon O'Neill’s", "l'eau d'avignon o'neill 's"),
    ('two -- three --- four ----- dashes – and — x', 'two three four ----- dashes and x'),
    ('wait... what.... no . . . yes…', 'wait what no yes'),
    ('$5.00, US$5, £5, 5¢, €5 and #5', '$ 5.00 us$ 5 # 5 5 cents $ 5 and # 5'),
    ('5% of 1,000.50 at 10:30am, 10:30 p.m.', '5 % of 1,000.50 at 10:30 am 10:30 p.m.'),
    ('U.S. and u.s., U.S.A.; the U.K', 'u.s. and u.s. u.s.a. the u.k'),
    ('Mr. Smith, Dr. No, St. John vs. Mt. Fuji', 'mr. smith dr. no st. john vs. mt. fuji'),
    ('Co. Inc. etc. Jan. Ave. Blvd. ft. sq. in. oz.', 'co. inc. etc. jan. ave. blvd. ft. sq. in oz'),
    ('Wash. the dog. wash. it. Miss. X miss. x', 'wash. the dog wash it miss. x miss x'),
    ('No. 5, no. no, fig. 3 fig. x p. 3', 'no. 5 no no fig. 3 fig x p. 3'),
    ('Plan B. The dog. Plan b. then', 'plan b the dog plan b. then'),
    ('a plan B.', 'a plan b'),
    ('Ph.D. a.m. e.g. i.e.', 'ph.d. a.m. e.g. i.e.'),
    ('(a man) [on] {a} <horse>', '-lrb- a man -rrb- -lsb- on -rsb- -lcb- a -rcb- <horse>'),
    ('a man/woman, and/or 1/2 of 24/7 w/ a dog', 'a man/woman and/or 1/2 of 24/7 w / a dog'),
    ('1 1/2 and 1-1/2 or ½, ¼ ⅔ ⅛', '1\xa01/2 and 1-1/2 or 1/2 1/4 2/3 ⅛'),
    (':) :( ;-) :D :P =) :/', ':-rrb- :-lrb- ;--rrb- :d :p =-rrb- /'),
    ('<3 8) ^_^ (^_^)', '< 3 8 -rrb- ^_^ -lrb-^_^-rrb-'),
    ('http://foo.com/bar?x=1, www.foo.com', 'http://foo.com/bar?x=1 www.foo.com'),
    ('foo.com. a@b.com, @name #tag', 'foo.com a@b.com, @name #tag'),
    ('image.jpg, file.txt. song.mp3 page.html', 'image.jpg file.txt song.mp3 page.html'),
    ('AT&T R&D Q&A B&W black&white a & b &amp; c', 'at&t r&d q&a b&w black & white a & b & c'),
    ('mother-in-law well-known T-shirt,', 'mother-in-law well-known t-shirt'),
    ('x-ray. 10-year-old 1990-91', 'x-ray 10-year-old 1990-91'),
    ('1st 2nd 3rd 20th 5pm 6ft 2x4', '1st 2nd 3rd 20th 5pm 6ft 2x4'),
    (
        '3/4/2010 03-04-10 555-1234 (555) 555-1234 555.555.1234',
        '3/4/2010 03-04-10 555-1234 -lrb-555-rrb-\xa0555-1234 555.555.1234',
    ),
    ('naïve café Ünder straße 日本語 привет', 'naïve café ünder straße 日本語 привет'),
    ('dog😀cat 😀 ❤ ★ ™ © ® • · °', 'dog cat ❤ ★ ™ © ® • · °'),
    ('5° 5°F x² m³ H₂O 3×4 ÷', '5 ° 5 ° f x ² m ³ h ₂ o 3 × 4 ÷'),
    ('soft\xadhyphen \xad x', 'softhyphen x'),
    (
        'end.Next a.b hello!hello what?!now yes... no!? !!! ???',
        'end.next a.b hello!hello what ?! now yes no !? !!! ???',
    ),
    ('snake_case __init__ a_b', 'snake_case __ init __ a_b'),
    ('**bold** *x* ~ ^ | \\ / % + = == @ @@ ##', '** bold ** * x * ~ ^ | \\ / % + = = = @ @@ ##'),
    (
        '<br> <b>bold</b> < b> <a href="x"> &lt;i&gt; &quot;q&quot; &eacute;t&eacute; &nbsp; &mdash; &#39;',
        '<br> <b> bold </b> < b > <a\xa0href="x"> < i > q &eacute;t&eacute; &#39;',
    ),
    ('C++ C# pro- anti- S&P-500 -LRB-', 'c++ c# pro- anti- s&p-500 -lrb-'),
    ('a ,b ; c:d , e;f g , 1,2', 'a b c :d e f g 1,2'),
    ("`back' ``quotes'' '' ' `", 'back quotes'),
    ('tabs\tand\xa0no-break\u2003blanks\u3000x', 'tabs and no-break blanks x'),
    ('', ''),
    ('   ', ''),
    ('.', ''),
    ('A man.,  a dog.; x.: y', 'a man. a dog. x. y'),
    ("don`t dont' do'nt n't 's", "do n`t dont do nt n't 's"),
    ('she said "Hi." \'Hi.\' (Hi.) Hi!"', 'she said hi hi -lrb- hi -rrb- hi'),
    ("jr. sr. Jr., co.'s x.'s", "jr. sr. jr. co. 's x. 's"),
    ('a\\/b \\* a\\b', 'a\\/b \\* a \\ b'),
    ('MEN AT WORK. STOP! NO-PARKING', 'men at work stop no-parking'),
    ('x,y,z 1,2,3 1;2 1:2 :55 .5 -5 +5 5-', 'x y z 1,2,3 1 2 1:2 :55 .5 -5 +5 5'),
    ('‹single› «double» „low‚ ’‘ “”', "single double „ low ‚ '` ``''"),
]  # fmt: skip

WHO = "a man|a woman in a red dress|two dogs|several people|the black and white cat|an old bus|some giraffes"
WHAT = "is riding|are standing next to|holding|sits on top of|walks past|flying over|is parked in front of"
WHERE = "a wooden bench|the street|a field of grass|some motorcycles|a table with food|the beach at sunset"
BITS = r"""
can't 's n't U.S. Mr. No. St. B. e.g. p.m ... .. -- ( ) [ ] :) ; / & #1 $ % ½ é “ ” ’s ‘ – … 😀 www.x.com
a@b.c - _ * ! ? , . ' " ` cannot gonna Wanna 'em O' 3rd 10:30 1,000 <b> > < = + \ | ~ ^ @ 1990s
'90s A The co etc.
"""
INGREDIENTS = [odd for caption, _ in ODD for odd in caption.split(" ") if odd]
INGREDIENTS += [*BITS.split(), "\u00a0", "\u00ad"]


def plain(rng: random.Random) -> str:
    """A caption as people write them."""
    said = " ".join(rng.choice(each.split("|")) for each in (WHO, WHAT, WHERE))
    more = rng.choice(["", "", ", looking up", " with a clock", " while it rains"])
    said = rng.choice([str.capitalize, str.capitalize, str.lower, str.upper])(said + more)
    return said + rng.choice([".", ".", "", " .", ". ", "!"])


def odd(rng: random.Random) -> str:
    """A caption with odd things in it, at times stuck to its words or to each other."""
    parts = plain(rng).split(" ")[: rng.randint(0, 6)]
    for _ in range(rng.randint(1, 6)):
        stuck = "".join(rng.choice(INGREDIENTS) for _ in range(rng.choice([1, 1, 1, 2, 3])))
        if parts and rng.random() < 0.3:
            parts[rng.randrange(len(parts))] += stuck
        else:
            parts.insert(rng.randint(0, len(parts)), stuck)
    return " ".join(parts)


def made(number: int, seed: int, references: int = 5) -> tuple[list[Prediction], list[Example]]:
    """Captions that have much in common with their references, odd ones and empty ones among them."""
    rng = random.Random(seed)
    predictions, examples = [], []
    for at in range(number):
        make = odd if at % 4 == 0 else plain
        answers = tuple(make(rng) for _ in range(references if at % 3 else rng.randint(1, references)))
        own = answers[0].split(" ")
        changed = [word for word in own if rng.random() > 0.2] + rng.choice([[], [], ["."], ["dogs"], own])
        text = rng.choice(
            [make(rng), " ".join(changed), " ".join(changed), rng.choice([answers[-1], "", " ."])]
        )
        predictions.append(Prediction(str(at), text))
        examples.append(Example(str(at), Path(f"{at}.jpg"), answers=answers))
    return predictions, examples
