"""Names for containers whose owner gave none: `adjective_surname`."""

from __future__ import annotations

from collections.abc import Callable

ADJECTIVES = """
able agile airy alert amber ample ardent balmy bold brave breezy bright brisk calm candid cheery civil clear clever
cosmic cosy crisp curious daring deft dreamy eager earnest easy fair fearless fleet fluent fond frank free fresh
frugal gallant genial gentle glad golden grand green handy happy hardy hearty honest humble ideal jolly jovial joyful
just keen kind laughing lively loyal lucid lucky mellow merry mighty mild mindful modest neat nimble noble patient
placid playful plucky polite proud quick quiet ready robust rosy serene sharp shiny silent sincere sleek smart snug
sober solid sparkling spry stable steady sturdy subtle sunny sure swift tender tidy trusty upbeat valiant vivid warm
watchful wise witty zesty
""".split()

# People of science and engineering.
SURNAMES = """
abel agnesi alhazen ampere anning archimedes aryabhata babbage banneker banu bardeen bartik bassi bell bernoulli
blackwell bohr bolt boole borg bose brahe brahmagupta brattain brunel buck burnell cantor carson cartwright cauchy
cerf chandra chatelet clarke cohen colden cori cray curie curran darwin davinci davy dijkstra dirac driscoll easley
edison einstein elion ellis engelbart euclid euler faraday fermat fermi feynman flowers fourier franklin galileo galois
gauss germain goldberg goldstine goodall hamilton hawking heaviside heisenberg herschel hertz hilbert hodgkin hooke
hopper hubble huygens hypatia ibn-sina jackson jemison jennings johnson joliot joule kalam kepler khayyam khorana kilby
kirch knuth kovalevsky lagrange lamarr lamport leakey leavitt leibniz lewin lichterman liskov lovelace lumiere mahavira
margulis maxwell mayer mcclintock mclean mcnulty meitner mendel mendeleev merian minsky mirzakhani montalcini morse
napier newton nightingale nobel noether noyce ohm panini pare pascal pasteur payne perlman pike planck poincare ptolemy
raman ramanujan rhodes ride ritchie rosalind rubin rutherford saha sammet satoshi shannon shaw shirley shockley
sinoussi snyder spence stallman steinmetz stokes swanson swartz swirles tesla tharp thompson torvalds turing
varahamihira villani volta wescoff wiles williams wilson wing wright wu yalow yonath zhukovsky zuse
""".split()


def generate_name(choose: Callable[[int], int], retry: int = 0) -> str:
    """Make a name; `choose(n)` gives a number in 0..n-1. A retry appends a digit, as the engine we replace does."""
    name = f"{ADJECTIVES[choose(len(ADJECTIVES))]}_{SURNAMES[choose(len(SURNAMES))]}"
    return f"{name}{choose(10)}" if retry else name
