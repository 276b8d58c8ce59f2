"""Makes small.json: a byte-level BPE of 1,024 ids for instructions to robots. It knows common words whole, and any text by bytes.

`python -m lerobot_pi0.tokenizers.make_small` writes it anew. The special ids are PaliGemma's: 0 pad, 1 end, 2 beginning, 3 unknown.
"""

import itertools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VERBS = """open close push pull press pick place put move slide turn rotate lift lower grasp grab release drop insert remove unplug plug
lock unlock reach hit kick shoot throw pour stack unstack fold unfold wipe sweep sort pass hand hold stop go approach wave wash clean
cover uncover cut hang bring take give fill empty flip twist squeeze hammer assemble disassemble carry point scoop stir""".split()
THINGS = """faucet door drawer button window handle lever plate puck ball goal block cube box bowl cup mug glass bottle can pan pot lid peg
hole nut bolt wrench hammer nail stick shelf table tray basket bin sink stove oven microwave toaster fridge cabinet counter book towel cloth
shirt sponge brush pen marker tape cable plug socket switch knob dial light toy bear duck lego banana apple orange lemon carrot bread egg
meat cheese milk juice sauce butter soup spoon fork knife spatula whisk basketball soccer coffee machine arm gripper hand robot wall target
object position front back side edge corner center middle T""".split()
QUALITIES = """red green blue yellow orange purple pink black white grey gray brown silver golden small big large little tall short long round
square flat empty full wooden plastic metal soft left right top bottom upper lower first second third other same both all""".split()
LINKS = """to the a an of in into on onto from with at by over under behind between next near inside outside up down out off away and then it
its one two three four forward backward clockwise counterclockwise""".split()


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A verb begins an instruction, with or without a capital; every other word follows a space.
    begin = [form for verb in VERBS for form in (verb, verb.capitalize())]
    follow = [f"x {word}" for word in (*THINGS, *QUALITIES, *LINKS, *VERBS)]
    tokenizer.train_from_iterator(itertools.chain(begin * 2, follow * 3), trainer)
    tokenizer.save(str(Path(__file__).with_name("small.json")), pretty=False)


if __name__ == "__main__":
    main()
