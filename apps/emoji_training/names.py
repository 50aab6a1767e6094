"""What the models are taught: which drawings, and how they are said in words."""

# Names left out (a pattern to search for): flags, keycaps, clock faces, letters, digits, buttons, skin tones, and the
# variants of persons. At this size they are noise to the model, and a prompt for one of them would only disappoint.
NOT_TAUGHT = (
    r"(^|-)(flags?|keycap|button|oclock|o-clock|letter|digit|input|japanese|couple|family|skin)(-|$)"
    r"|-tone\d?(-|$)|-thirty$|\d$|^\d|-(dark|light|medium)$"
    r"|^(wo)?m[ae]n(-|$)|^(person|people|kiss|mx|mrs)-|-facing-right|haired$|^(bald|asterisk|middle-finger)$"
)

# What the small model is taught: single, clearly recognisable objects. One emoji a word, spelt as in the archives.
NAMES: tuple[str, ...] = tuple(
    """
    red-apple green-apple pear tangerine lemon banana watermelon grapes strawberry cherries peach pineapple coconut
    kiwi-fruit tomato avocado eggplant carrot ear-of-corn hot-pepper broccoli mushroom croissant pretzel
    cheese-wedge hamburger french-fries pizza hot-dog doughnut cookie birthday-cake cupcake lollipop soft-ice-cream
    popcorn hot-beverage beer-mug wine-glass cooking
    cat-face dog-face tiger-face panda fox bear koala lion pig-face cow-face frog monkey-face rabbit-face mouse-face
    polar-bear penguin owl baby-chick octopus butterfly lady-beetle snail turtle tropical-fish spouting-whale elephant
    crab
    sun crescent-moon star cloud rainbow fire droplet snowflake sunflower tulip rose cherry-blossom hibiscus
    four-leaf-clover maple-leaf cactus palm-tree evergreen-tree deciduous-tree
    red-heart orange-heart yellow-heart green-heart blue-heart purple-heart
    balloon wrapped-gift rocket automobile bus sailboat house soccer-ball basketball umbrella crown gem-stone
    light-bulb key bell guitar trophy candle closed-book green-book blue-book t-shirt top-hat christmas-tree
    snowman-without-snow jack-o-lantern ghost alien robot skull slightly-smiling-face smiling-face-with-sunglasses
    smiling-face-with-heart-eyes teddy-bear anchor magnet
    """.split()
)

# Drawings the VAE never sees in training, to measure it on.
HELD_OUT: tuple[str, ...] = tuple(
    """
    mango melon lime potato peanuts sandwich pancakes zebra wolf kangaroo shark lobster parrot flamingo sloth
    violin trumpet backpack helicopter tractor tent telescope microscope bucket hammer wrench airplane bicycle
    mountain volcano blossom compass
    """.split()
)

# Names whose plain spelling is not what a person would type.
PHRASES: dict[str, str] = {
    "ear-of-corn": "ear of corn",
    "hot-beverage": "cup of coffee",
    "beer-mug": "mug of beer",
    "wine-glass": "glass of wine",
    "cooking": "fried egg",
    "cheese-wedge": "piece of cheese",
    "pizza": "slice of pizza",
    "kiwi-fruit": "kiwi fruit",
    "soft-ice-cream": "ice cream",
    "panda": "panda face",
    "fox": "fox face",
    "bear": "bear face",
    "koala": "koala face",
    "lion": "lion face",
    "frog": "frog face",
    "polar-bear": "polar bear face",
    "spouting-whale": "whale",
    "lady-beetle": "ladybug",
    "tropical-fish": "fish",
    "crescent-moon": "moon",
    "four-leaf-clover": "four leaf clover",
    "evergreen-tree": "fir tree",
    "deciduous-tree": "tree",
    "wrapped-gift": "gift box",
    "automobile": "car",
    "soccer-ball": "soccer ball",
    "gem-stone": "diamond",
    "closed-book": "red book",
    "snowman-without-snow": "snowman",
    "jack-o-lantern": "halloween pumpkin",
    "slightly-smiling-face": "smiling face",
    "smiling-face-with-sunglasses": "face with sunglasses",
    "smiling-face-with-heart-eyes": "face with heart eyes",
}

# Other words for the same thing, each used in some captions.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "red-apple": ("apple",),
    "tangerine": ("orange fruit", "mandarin"),
    "ear-of-corn": ("corn",),
    "hot-pepper": ("chili pepper",),
    "french-fries": ("fries",),
    "hamburger": ("burger",),
    "doughnut": ("donut",),
    "birthday-cake": ("cake",),
    "hot-beverage": ("coffee cup", "cup of tea"),
    "beer-mug": ("beer",),
    "wine-glass": ("wine glass",),
    "cheese-wedge": ("cheese",),
    "pizza": ("pizza",),
    "kiwi-fruit": ("kiwi",),
    "soft-ice-cream": ("ice cream cone",),
    "cat-face": ("cat",),
    "dog-face": ("dog",),
    "tiger-face": ("tiger",),
    "panda": ("panda",),
    "fox": ("fox",),
    "bear": ("bear",),
    "koala": ("koala",),
    "lion": ("lion",),
    "pig-face": ("pig",),
    "cow-face": ("cow",),
    "frog": ("frog",),
    "monkey-face": ("monkey",),
    "rabbit-face": ("rabbit", "bunny"),
    "mouse-face": ("mouse",),
    "polar-bear": ("polar bear", "white bear"),
    "baby-chick": ("chick",),
    "tropical-fish": ("tropical fish",),
    "lady-beetle": ("beetle", "lady beetle"),
    "crescent-moon": ("crescent moon",),
    "droplet": ("drop of water",),
    "fire": ("flame",),
    "four-leaf-clover": ("clover",),
    "evergreen-tree": ("pine tree", "evergreen tree"),
    "red-heart": ("heart",),
    "wrapped-gift": ("gift", "present"),
    "automobile": ("automobile",),
    "sailboat": ("boat", "sailing boat"),
    "soccer-ball": ("football",),
    "gem-stone": ("gem",),
    "light-bulb": ("lamp",),
    "closed-book": ("book",),
    "t-shirt": ("shirt",),
    "jack-o-lantern": ("pumpkin",),
    "slightly-smiling-face": ("smiley", "smile"),
    "smiling-face-with-sunglasses": ("smiley with sunglasses",),
    "smiling-face-with-heart-eyes": ("smiley with heart eyes",),
}

# The colour of things whose name does not say it: lets "a yellow banana" mean something.
COLOURS: dict[str, str] = {
    "pear": "green",
    "tangerine": "orange",
    "lemon": "yellow",
    "banana": "yellow",
    "strawberry": "red",
    "cherries": "red",
    "grapes": "purple",
    "tomato": "red",
    "avocado": "green",
    "eggplant": "purple",
    "carrot": "orange",
    "hot-pepper": "red",
    "broccoli": "green",
    "cat-face": "yellow",
    "tiger-face": "orange",
    "fox": "orange",
    "pig-face": "pink",
    "frog": "green",
    "lady-beetle": "red",
    "baby-chick": "yellow",
    "turtle": "green",
    "spouting-whale": "blue",
    "crab": "red",
    "sun": "yellow",
    "crescent-moon": "yellow",
    "star": "yellow",
    "droplet": "blue",
    "snowflake": "blue",
    "sunflower": "yellow",
    "rose": "red",
    "four-leaf-clover": "green",
    "cactus": "green",
    "balloon": "red",
    "automobile": "red",
    "soft-ice-cream": "white",
    "basketball": "orange",
    "gem-stone": "blue",
    "jack-o-lantern": "orange",
    "ghost": "white",
    "slightly-smiling-face": "yellow",
    "crown": "golden",
    "key": "golden",
    "bell": "golden",
    "trophy": "golden",
    "teddy-bear": "brown",
}

# Said without "a": plurals, substances and the signs of the zodiac.
NO_ARTICLE: frozenset[str] = frozenset(
    """
    grapes|cherries|french fries|fries|popcorn|broccoli|fire|cheese|pizza|corn|beer|bacon|bread|butter|coral
    cooked rice|curry rice|fog|garlic|ginger root|ice|infinity|leafy green|rice|sake|salt|shaved ice|soap
    spaghetti|sushi|wood|aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo
    badminton|bowling|camping|cricket game|field hockey|ice hockey|lacrosse|ping pong|tennis
    """.strip()
    .replace("\n    ", "|")
    .split("|")
)
