#!/usr/bin/env python3
"""Golden files of tests/data/tokenizer, and comparisons by hand, with the PyPI package `tokenizers`.

  tokenizer.py write FOLDER                       small tokenizers of each style, and what they give
  tokenizer.py compare TOKENIZER.json TEXT BINARY a file's lines: `lockstep tokenize` against encode(line)
  tokenizer.py corpus TEXT MEGABYTES FILE...      mixed text: the files, CJK, emoji, marks, random bytes

python3 -m venv venv && venv/bin/pip install tokenizers jinja2
The files were written with tokenizers 0.23.3 and jinja2 3.1.6. The tables of src/model/unicode_tables.h come from the
same comparison for each code point: Split(Regex("\\\\p{..}"), "removed") for the general categories, NFD and NFKD, Lowercase.
"""
import json
import os
import random
import subprocess
import sys

TRAINING = """The quick brown fox doesn't jump over the lazy dogs; it's 12345 steps, they've said. I'll go, you'd stay, we're here.
def main(argc: int) -> None:\n    for i in range(1000):\n        print(f"{i:04d}\\t{i * i}")\n\n\nint main() { return 0; }
La forêt française, naïve façade, Zürich Straße, señor. Привет, мир! Как дела? 你好，世界。今天天气很好。こんにちは、カタカナ。안녕하세요 세계.
مرحبا بالعالم. שלום עולם. नमस्ते दुनिया। 😀😃👩‍👩‍👧‍👦🏳️‍🌈👍🏽 e\u0301a\u0308 \u00e9\u00e4  two  spaces   three\r\n\r\ntabs\t\tend
$x = y^2 + z_i \\le 10^{-3}$; http://example.org/a?b=c&d=%20 [1, 2.5, "three"] <div class="x">text</div> ...!!! ### *** ---
"""

CASES = ["", " ", "  ", "\n", "\r\n", "\t", "a", "Hello world", " Hello  world ", "Hello, world! It's 2024; don't they've I'LL WE'RE.",
         "1", "12", "123", "1234567890", "3.14159 1,000,000 ①②½ ٣٤٥ Ⅷ", "a1b22c333", "x\n\ny\n \n  z\r\n\r\nw \n",
         "    def f(x):\n\treturn x ** 2  # comment\n", "if(a&&b||!c){return a<<=2;}//!!", "你好，世界。今天天氣很好！", "日本語のテスト、カタカナとひらがな。",
         "안녕하세요 세계", "\u1100\u1161\u11a8 \u11a7 가\u11a7", "Привет мир", "مرحبا بالعالم", "नमस्ते दुनिया", "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽", "\u200d\ufe0f\u200b",
         "e\u0301 \u00e9 e\u0316\u0301 e\u0301\u0316 \u0301", "ﬁ ﬂ № ™ ㎏ ﷺ Å Å", "İstanbul ıI ǅ ẞ ß ſ K", "\u00a0nbsp\u2003em\u3000ideographic\u180emongolian\u0085nel",
         "\u2028line\u2029para\u000bvt\u000cff\u001cfs", "a\u0000b\u007f", "\ufffd\ufffd\ufeffbom", "\U0010ffff\U000e0001\ue000", "𝕳𝖊𝖑𝖑𝖔 𠜎𠜱",
         "\u0897\U00010d4a\U0001e4d0\U0001fae8\U0001faf8\U00031350\U0001f6dc", "'s 'S ’s 'ſ 'll 'Ll 'VE x's's", "don't" * 3, "a" * 70, "ab" * 100,
         " " * 65 + "x", "\n" * 33, "-" * 80, "=>" * 40, "word " * 30, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
         "<|endoftext|><|endoftext|>", " <|endoftext|> x<|endoftext|>y <|im_end|>", "<|im_end|", "<think>hm</think>", "x <mask> y", "x<mask>y", "<s>a</s> <unk>",
         "ALPHA alpha_beta ALPHA_ ALPHA\u0301 (ALPHA) ALPHA\u200d", "naïve café Don't", "_x__y", "a-b--c---d", "1-2-3", "\u00b2\u00b3\u00b9\u00bc x\u00b2",
         "<0x41><0x0A>", "▁a ▁▁b", "the  the\tthe\nthe"]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2_CLITICS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = GPT2_CLITICS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
LLAMA3 = GPT2_CLITICS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + GPT2_CLITICS + "?|"
O200K = CASED % ("*", "+") + CASED % ("+", "*") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def write_tokenizers(folder):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    split = lambda p, how="isolated", invert=False: pre_tokenizers.Split(Regex(p) if isinstance(p, str) else p[0], how, invert)
    level = lambda prefix=False, regex=False: pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    sequence = pre_tokenizers.Sequence
    special = lambda text, **more: AddedToken(text, special=True, **{"normalized": False, **more})
    plain = lambda text, **more: AddedToken(text, special=False, **{"normalized": False, **more})

    def make(name, pre, normalizer=None, added=(), post=None, decoder=None, size=900, model={}, change=None, alphabet=None, **trainer):
        t = Tokenizer(models.BPE(**model))
        if normalizer:
            t.normalizer = normalizer
        if pre:
            t.pre_tokenizer = pre
        text = TRAINING if pre else TRAINING.replace(" ", " ▁").split(" ")
        t.train_from_iterator([text] if pre else text, trainers.BpeTrainer(
            vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if (pre if alphabet is None else alphabet) else [],
            **trainer))
        t.decoder = decoder or decoders.ByteLevel()
        for token in added:
            (t.add_special_tokens if token.special else t.add_tokens)([token])
        if post:
            t.post_processor = post(t)
        document = json.loads(t.to_str())
        if change:
            change(document)
        path = os.path.join(folder, name + ".json")
        with open(path, "w", encoding="utf-8") as out:
            json.dump(document, out, ensure_ascii=False, separators=(",", ":"))
        t = Tokenizer.from_file(path)
        rows = []
        for case in CASES:
            ids = t.encode(case).ids
            bare = t.encode(case, add_special_tokens=False).ids
            rows.append([case, ids, bare if bare != ids else None, t.decode(ids), t.decode(ids, skip_special_tokens=False)])
        random.seed(name)
        streams = []
        for _ in range(60):
            ids = [random.randrange(t.get_vocab_size()) for _ in range(random.randrange(1, 24))]
            streams.append([ids, t.decode(ids)])
        with open(os.path.join(folder, name + ".cases.json"), "w", encoding="utf-8") as out:
            json.dump({"cases": rows, "decode": streams}, out, ensure_ascii=True, separators=(",", ":"))

    specials = [special(s) for s in SPECIAL]
    around = lambda t: processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", pair="$A $B:1",
        special_tokens=[(s, t.token_to_id(s)) for s in ("<|endoftext|>", "<|im_end|>")])])

    def ignore_merges(d):  # the last tokens are only reached whole
        d["model"]["ignore_merges"] = True
        d["model"]["merges"] = d["model"]["merges"][:-40]

    def three(d):
        d["added_tokens"] = [t for t in d["added_tokens"] if t["id"] < 3]

    def holes(d):
        three(d)
        for b in list(range(0x80, 0xA0)) + [0x41]:
            d["model"]["vocab"][f"<hole{b}>"] = d["model"]["vocab"].pop(f"<0x{b:02X}>")
        d["model"]["fuse_unk"] = False

    def strings(d):
        d["model"]["merges"] = [" ".join(m) for m in d["model"]["merges"]]

    make("qwen", sequence([split(QWEN), level()]), normalizers.NFC(), specials + [plain("<think>"), plain("</think>")],
         lambda t: processors.ByteLevel(trim_offsets=False))
    make("llama3", sequence([split(LLAMA3), level()]), None, specials, around, change=ignore_merges)
    make("deepseek", sequence([split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), level()]), normalizers.Sequence([]),
         specials + [plain("<think>", normalized=True)])
    make("gpt2", level(regex=True), None, specials, lambda t: processors.ByteLevel(trim_offsets=False), change=strings)
    make("smollm", sequence([pre_tokenizers.Digits(individual_digits=True), level(regex=True)]), None, specials)
    # Many options at once.
    make("odd", sequence([split(r"\s+", "merged_with_next"), split(["-"], "merged_with_previous"), split(r"\w+", "contiguous", True),
                          pre_tokenizers.Digits(individual_digits=False), split("[aeiou]{2}", "removed"), level(True, True)]),
         normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\d{4,}"), "<num>"),
                               normalizers.Replace("ll", "LL"), normalizers.Strip(), normalizers.Prepend("_")]),
         [special("<|im_start|>", lstrip=True, rstrip=True), special("<|im_end|>", single_word=True), plain("ALPHA", single_word=True),
          plain("Don't", normalized=True), plain("é", normalized=True, rstrip=True), plain("<mask>", lstrip=True), plain("  ")])
    make("o200k", sequence([split(O200K), level()]), None, specials)
    make("falcon", sequence([pre_tokenizers.Punctuation("contiguous"), level(regex=True), pre_tokenizers.Digits(individual_digits=False),
                             split("[0-9][0-9][0-9]")]), None, specials)
    # Words between blanks and between words and signs, cut at a character.
    make("words", sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.CharDelimiterSplit("-"), pre_tokenizers.Whitespace(), level()]),
         normalizers.NFC(), specials)
    # SentencePiece turned into BPE: as Mixtral has it, and by Metaspace, as newer files of Llama 2 and TinyLlama have it.
    bytes_first = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    for name, change in (("mixtral", three), ("holes", holes)):
        make(name, None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), [],
             lambda t: processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]),
             decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
             model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}, change=change, special_tokens=bytes_first,
             limit_alphabet=60)
    def no_bytes(d):  # as added tokens
        d["added_tokens"] = [t for t in d["added_tokens"] if not t["content"].startswith("<0x")]

    pieces = [special("<s>"), special("</s>", lstrip=True), plain("<mask>", normalized=True, rstrip=True), plain("▁x▁")]
    make("gemma", split([" "], "merged_with_previous"), normalizers.Replace(" ", "▁"), pieces[:1] + [plain("\n\n"), plain("▁▁")],
         None, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
         model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}, special_tokens=bytes_first,
         alphabet=False, limit_alphabet=60, change=no_bytes)
    metaspace = lambda scheme, cut: pre_tokenizers.Metaspace(prepend_scheme=scheme, split=cut)
    for name, scheme, cut, fallback in (("metaspace", "always", True, False), ("metaspace_first", "first", False, True),
                                        ("metaspace_never", "never", True, True)):
        after = [decoders.Metaspace(prepend_scheme=scheme)]
        make(name, metaspace(scheme, cut), normalizers.NFC() if cut else None, pieces,
             lambda t: processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]),
             decoders.Sequence([decoders.ByteFallback()] + after) if scheme == "never" else
             decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
             if fallback else after[0],
             model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": fallback},
             special_tokens=bytes_first if fallback else bytes_first[:3], alphabet=False, limit_alphabet=60, change=no_bytes)


# Templates with the marks of each family, in our words; the published ones were compared by hand (docs/tokenizers.md).
IM = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
QUESTION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}@{% endif %}"
QWEN3 = """{% set ns = namespace(last_query_index=messages|length - 1, seek=true) %}{% for m in messages[::-1] %}{% if ns.seek and m.role == 'user' and
not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}{% set ns.seek = false %}{% set ns.last_query_index = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content %}{% set reasoning_content = '' %}{% if m.role == 'assistant' %}{% if '</think>' in content %}
{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}{% set content = '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}{% endif %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"""
LLAMA = "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}{{ bos_token + c if loop.first else c }}{% endfor %}"
LLAMA_END = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
TURNS = "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
SYSTEM_OUT = "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
TEMPLATES = {
    "chatml": "{% for m in messages %}" + IM + "{% endfor %}" + QUESTION.replace("@", ""),
    "chatml_default": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{% for m in messages %}" + IM + "{% endfor %}" + QUESTION.replace("@", ""),
    "chatml_trim": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}",
    "qwen3": QWEN3 + QUESTION.replace("@", "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"),
    "qwen3_thinking": QWEN3 + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    "deepseek_v3": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    "deepseek_r1": "{% set ns = namespace(system='', is_first_sp=true) %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content if ns.is_first_sp else ns.system + '\\n\\n' + m.content %}{% set ns.is_first_sp = false %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1] %}{{ '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "llama3": LLAMA + "{% if add_generation_prompt %}" + LLAMA_END + "{% endif %}",
    "llama3_always": LLAMA + LLAMA_END,
    "llama31": "{% set date_string = \"26 Jul 2024\" %}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content']|trim %}{% set turns = messages[1:] %}{% else %}{% set system_message = \"\" %}{% set turns = messages %}{% endif %}{{ bos_token + \"<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: \" + date_string + \"\\n\\n\" + system_message + \"<|eot_id|>\" }}{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}" + LLAMA_END + "{% endif %}",
    "mistral_v1": "{{ bos_token }}{% for message in messages %}" + TURNS + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
    "mistral_v1_space": "{{ bos_token }}{% for message in messages %}" + TURNS + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
    "mixtral": SYSTEM_OUT + "{% for message in turns %}" + TURNS + "{% if message['role'] == 'user' %}{% if loop.first and system_message is defined %}{{ ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
    "mistral_v3": SYSTEM_OUT + "{% for message in turns %}" + TURNS + "{% if message['role'] == 'user' %}{% if loop.last and system_message is defined %}{{ '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content']|trim + eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
    "mistral_v7": SYSTEM_OUT + "{% if system_message is defined %}{{ '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}{% endif %}{% for message in turns %}" + TURNS + "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}",
}
CHATS = [[("user", "Hi")], [("system", " Be short. "), ("user", " Hi\n")], [("user", "a"), ("assistant", " b "), ("user", "c")],
         [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
         [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"), ("assistant", "<think>x</think>\nd\n")],
         [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")],
         [("system", "S"), ("user", "a"), ("system", "T"), ("user", "b")], [("assistant", "x")],
         [("user", "<tool_response>x</tool_response>"), ("assistant", "y")], [("user", "a"), ("assistant", "\n\nb</think>c")]]


def write_chats(folder):
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    # As transformers sets it up.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    out = []
    for name, text in TEMPLATES.items():
        template = environment.from_string(text)
        rows = []
        for chat in CHATS:
            for prompt in (True, False):
                for thinking in (True, False):
                    more = {} if thinking else {"enable_thinking": False}
                    try:
                        rendered = template.render(messages=[{"role": r, "content": c} for r, c in chat], bos_token="<bos>", eos_token="<eos>",
                                                   add_generation_prompt=prompt, **more)
                    except jinja2.exceptions.TemplateError:
                        rendered = None
                    rows.append([chat, prompt, thinking, rendered])
        out.append({"name": name, "template": text, "cases": rows})
    with open(os.path.join(folder, "chats.json"), "w", encoding="utf-8") as file:
        json.dump(out, file, ensure_ascii=True, separators=(",", ":"))


def compare(tokenizer, text, binary):
    from tokenizers import Tokenizer
    t = Tokenizer.from_file(tokenizer)
    with open(text, "rb") as file:
        raw = file.read()
    lines = raw.decode("utf-8", "replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    ours = subprocess.run([binary, "tokenize", "--model", tokenizer], input=raw, stdout=subprocess.PIPE, check=True).stdout.decode()
    ours = [json.loads(line) for line in ours.split("\n")[:-1]]
    theirs = [e.ids for e in t.encode_batch(lines)]
    bad = [i for i in range(max(len(ours), len(theirs))) if ours[i:i + 1] != theirs[i:i + 1]]
    print(f"{tokenizer}: {len(raw) / 1e6:.2f} MB, {len(lines)} lines, {sum(map(len, theirs))} tokens, {len(bad)} lines differ")
    for i in bad[:3]:
        print(f"  line {i + 1}: {lines[i][:80]!r}\n    lockstep   {ours[i][:20]}\n    tokenizers {theirs[i][:20]}")
    decoded = subprocess.run([binary, "tokenize", "--model", tokenizer, "--decode"],
                             input="".join(json.dumps(ids) + "\n" for ids in theirs).encode(), stdout=subprocess.PIPE, check=True).stdout.decode()
    texts = t.decode_batch(theirs)
    wrong = sum(json.loads(a) != b for a, b in zip(decoded.split("\n"), texts))
    print(f"  decoded: {wrong} lines differ")
    return 1 if bad or wrong else 0


def corpus(out, megabytes, files):
    random.seed(7)
    draw = lambda ranges, n: "".join(chr(random.randint(*random.choice(ranges))) for _ in range(n))
    kinds = {
        "cjk": [(0x4E00, 0x9FFF), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x3000, 0x303F), (0xFF00, 0xFFEF), (0x20000, 0x2A6DF)],
        "emoji": [(0x1F300, 0x1FAFF), (0x2600, 0x27BF), (0x1F1E6, 0x1F1FF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF), (32, 32)],
        "marks": [(0x300, 0x36F), (0x61, 0x7A), (0x41, 0x5A), (0xC0, 0x17F), (0x1AB0, 0x1AFF), (0x591, 0x5C7), (0x64B, 0x65F), (0x900, 0x97F), (0x1100, 0x11FF)],
        "space": [(9, 13), (32, 32), (32, 32), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200F), (0x3000, 0x3000), (0x180E, 0x180E), (0x61, 0x63), (0x30, 0x39), (0x21, 0x2F)],
    }
    parts, size, limit = [], 0, int(float(megabytes) * 1e6)
    for name in files:
        with open(name, "rb") as file:
            parts.append(file.read(limit // (2 * len(files))).decode("utf-8", "replace"))
        size += len(parts[-1].encode())
    while size < limit:
        kind = random.choice(list(kinds) + ["bytes", "any"])
        n = random.randint(1, 300)
        if kind == "bytes":
            text = os.urandom(n).decode("utf-8", "replace")
        elif kind == "any":
            text = "".join(chr(c) for c in (random.choice([random.randint(0, 0x10FFFF), random.randint(0, 0x2FFF)]) for _ in range(n))
                           if not 0xD800 <= c < 0xE000)
        else:
            text = draw(kinds[kind], n)
        parts.append(text)
        size += len(text.encode())
    with open(out, "wb") as file:
        file.write("\n".join(parts).encode())


def main(arguments):
    if arguments[:1] == ["write"] and len(arguments) == 2:
        os.makedirs(arguments[1], exist_ok=True)
        write_tokenizers(arguments[1])
        write_chats(arguments[1])
        return 0
    if arguments[:1] == ["compare"] and len(arguments) == 4:
        return compare(*arguments[1:])
    if arguments[:1] == ["corpus"] and len(arguments) > 3:
        return corpus(arguments[1], arguments[2], arguments[3:])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
