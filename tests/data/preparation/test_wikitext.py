"""Claims about the text that is made of MediaWiki's markup."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.preparation.wikitext import plain_text


@pytest.mark.parametrize(("wikitext", "paragraphs"), [
    # tags
    ("a <!-- no\n[[x]] --> b <!-- no", ["a b"]),
    ("a<ref name=x>{{cite|[[x]]}}</ref> b<ref name=x /> c<REF>x</ref >.", ["a b c."]),
    ("a <small>x<small>y</small></small> b<br>c <del>d</del> <std> <b\nclass=x>e</b>", ["a b c d <std> e"]),
    ("a <ul><li>x<ul><li>y</ul>z</ul> b<p>c</p>d <ref>e", ["a b", "c", "d e"]),
    ("<gallery>\nFile:x.jpg|x\n</gallery>a<syntaxhighlight lang=c>[[x]] {{</syntaxhighlight> b", ["a b"]),
    ("let <math>n + 1</math> and <math>f''</math> or <math>\\alpha</math>.\n:<math>\\frac{a}{b}</math>\n<ce>H2O</ce>",
     ["let n + 1 and f'' or.", "H2O"]),
    ("use <code>f</code> and <code><nowiki>[[x]] {{y}} ''z''</nowiki></code>", ["use f and [[x]] {{y}} ''z''"]),
    # templates and tables
    ("{{Box\n|a={{b|{{c}}}}\n|d=[[e]]\n}}\na {{x|{{{1|{{y}}}}}}} b", ["a b"]),
    ("{{formatnum:1234}} {{ucfirst:ab}} {{PAGENAME}} {{CURRENTYEAR}}c", ["1234 Ab Ä & B c"]),
    ("a\n{| class=x\n! [[b]]\n| c\n::{|\n| {{d|}}\n|}\n|}\nb", ["a", "b"]),
    ("{{Box\n|a=\n|}}\nb {{x|\n{|\n|a\n|}\n}} c", ["b c"]),
    ("a {{x|{{y|{{z}}}}[[b}} c\n{|\n|{{d\n|[[e\n|}\n f", ["a c", "f"]),
    # links
    ("[[A]]s [[a|b]] [[a|b|c]] [[A#b]] [[a {{x}}|d]] [[:Category:E]] [[a|f{{x}}g]]", ["As b b|c A#b d Category:E fg"]),
    ("a [[File:x.jpg|b [[c]] [//x d] {{e}}]] f [[Image:y.png|[//x z]]] [[Kategorie:G]] [[category: h]] [[de:i]]",
     ["a f"]),
    ("[[Alien: Covenant]], [[Köppen: A|k]], [[16:9]], [[wikt:moon]], [[s:x|y]]", ["Alien: Covenant, k, 16:9, moon, y"]),
    ("[http://x a [b]] [//x c] [http://x] [mailto:x d] http://x [e] [[http://x f]]", ["a [b] c d http://x [e] [f]"]),
    # quotes
    ("'''a''' ''b'' '''''c''''' ''d'''s L''''e''' ''{{x}}'' \"''f''\" it's", ["a \"b\" c \"d\"'s L'e \"f\" it's"]),
    # lines
    ("= A =\n== B ==\n=== C ===\na\n== D ==\n* e\n=== F? ===\n== G ==\nb\n== H ==", ["A.", "B.", "C.", "a", "G.", "b"]),
    ("* a\n# b\n; c : d\n:: e\n:* f\n----\n(g)\n(h) i\n|j\n!?\n__TOC__k\n<nowiki>*</nowiki>l",
     ["e", "(h) i", "k", "*l"]),
    # spaces, parentheses and entities
    ("A ({{x}}; born 1, {{x}}) ( {{x}} ) , b{{x}} . ( c ) , , d ... f()（{{x}}）", ["A (born 1), b. (c), d ... f()"]),
    ("a&nbsp;b &amp;lt; &lt;c&gt; &#8212; &#42; &bogus; &#99999999999999999999; AT&T&copy",
     ["a b &lt; <c> — * &bogus; &#99999999999999999999; AT&T&copy"]),
    # marks without a counterpart
    ("a ]] b }} c [[d\n{{Box\n|x=1\ne {{f [[g]]", ["a]] b }} c [[d", "e {{f g"]),
    ("[[a [[b]] c]] {{{d}} <ref>e</rex>", ["a b c { e</rex>"]),
], ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_markup_leaves_the_text_that_readers_see(wikitext, paragraphs):
    assert plain_text("Ä & B", wikitext).split("\t") == paragraphs


MARKS = ["[[", "]]", "{{", "}}", "{{{", "}}}", "{|", "|}", "|", "[", "]", "[http://x ", "<", ">", "<ref", "<ref>",
         "</ref>", "<small>", "</small>", "<!--", "-->", "<math>", "</math>", "<nowiki>", "''", "'''", "=", "\n==",
         "\n*", "\n:", "\n", "-{", "}-", "__", "&", "&amp;", "&#", ";", "File:", ":", "(", ")", ",", " ", "\t", "a",
         "é", "字", "\u2028", "\0"]


@given(st.lists(st.sampled_from(MARKS) | st.text(max_size=3), max_size=40).map("".join))
def test_no_markup_fails_and_all_of_it_becomes_one_line(wikitext):
    for paragraph in plain_text("T", wikitext).split("\t"):
        assert " ".join(paragraph.split()) == paragraph
        assert "\n" not in paragraph


WORDS = st.integers(10, 99).map(lambda number: f"w{number}")
HIDDEN = st.integers(10, 99).map(lambda number: f"h{number}")


def marked(before: str, content, after: str):
    """Content between two marks, with what is shown of it."""
    return content.map(lambda pair: (before + pair[0] + after, pair[1]))


def hidden(before: str, content, after: str):
    return content.map(lambda pair: (before + pair[0] + after, []))


def joined(pieces) -> tuple[str, list[str]]:
    return " ".join(markup for markup, _ in pieces), [word for _, shown in pieces for word in shown]


def nested(content):
    """Every kind of markup around content."""
    inside = st.lists(content, min_size=1, max_size=3).map(joined)
    return st.one_of(
        *(marked(before, inside, after) for before, after in (
            ("<div class=x>", "</div>"), ("<span>", "</span>"), ("<code>", "</code>"), ("\n:", ""), ("\n", "\n"))),
        *(hidden(before, inside, after) for before, after in (
            ("{{t|", "}}"), ("{{{p|", "}}}"), ("\n{|\n|", "\n|}\n"), ("[[File:x.jpg|thumb|", "]]"), ("<ref>", "</ref>"),
            ("<!--", "-->"), ("<small>", "</small>"), ("<ul>\n<li>", "</ul>"), ("<gallery>", "</gallery>"))))


PLAIN = st.one_of(
    WORDS.map(lambda word: (word, [word])),
    st.tuples(st.sampled_from(["[[%s]]", "'''%s'''", "''%s''", "[http://x.y %s]", "<nowiki>%s</nowiki>", "[[h|%s]]"]),
              WORDS).map(lambda pair: (pair[0] % pair[1], [pair[1]])),
    st.tuples(st.sampled_from(["{{%s}}", "[[Category:%s]]", "\n* %s\n", "<math>\\%s</math>"]),
              HIDDEN).map(lambda pair: (pair[0] % pair[1], [])))


def nests_what_ends_first(markup: str) -> bool:
    """Whether an element that ends with its first end tag holds another of its kind, which MediaWiki does not nest."""
    return any(markup.count(start) > 1 for start in ("<ref>", "<gallery>", "<!--"))


@given(st.lists(st.recursive(PLAIN, nested, max_leaves=12), max_size=4).map(joined).filter(
    lambda pair: not nests_what_ends_first(pair[0])))
def test_well_formed_markup_leaves_its_words_in_order_and_no_mark(pair):
    wikitext, words = pair
    text = plain_text("T", wikitext)
    assert text.replace('"', " ").split() == words


@pytest.mark.parametrize("start, end", [
    ("{{", "}}"), ("{{a|", "}}"), ("{{{", "}}}"), ("[[a|", "]]"), ("[[File:a.jpg|", "]]"), ("\n{|\n|", "\n|}"),
    ("<small>", "</small>"), ("<ref>", "</ref>"), ("<ref>", "<ref>"), ("<!--", "-->"), ("[http://a ", "]"),
    ("'''''", "''''' "), ("\n==a", "=="), ("-{", "}-"), ("(,", ",)"), ("<ul>{{[[\n{|", "</ul>")])
def test_a_hundred_thousand_marks_are_read_in_time(start, end):
    for wikitext in (start * 100_000 + end, start * 100_000 + end * 100_000, (start + end) * 100_000, end * 100_000):
        assert plain_text("T", f"{wikitext}\n\nThe end.").endswith("The end.")
