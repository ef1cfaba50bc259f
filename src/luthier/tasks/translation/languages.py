"""Names of languages by their ISO 639-1 and 639-3 codes, for prompts and for the choice of a tokenizer."""

from __future__ import annotations

_NAMES = {
    "af afr": "Afrikaans",
    "am amh": "Amharic",
    "ar ara arb": "Arabic",
    "az aze azj": "Azerbaijani",
    "be bel": "Belarusian",
    "bg bul": "Bulgarian",
    "bn ben": "Bengali",
    "bs bos": "Bosnian",
    "ca cat": "Catalan",
    "cs ces": "Czech",
    "cy cym": "Welsh",
    "da dan": "Danish",
    "de deu": "German",
    "el ell": "Greek",
    "en eng": "English",
    "es spa": "Spanish",
    "et est": "Estonian",
    "eu eus": "Basque",
    "fa fas": "Persian",
    "fi fin": "Finnish",
    "fr fra": "French",
    "ga gle": "Irish",
    "gl glg": "Galician",
    "gu guj": "Gujarati",
    "ha hau": "Hausa",
    "he heb": "Hebrew",
    "hi hin": "Hindi",
    "hr hrv": "Croatian",
    "hu hun": "Hungarian",
    "hy hye": "Armenian",
    "id ind": "Indonesian",
    "is isl": "Icelandic",
    "it ita": "Italian",
    "ja jpn": "Japanese",
    "ka kat": "Georgian",
    "kk kaz": "Kazakh",
    "km khm": "Khmer",
    "kn kan": "Kannada",
    "ko kor": "Korean",
    "lo lao": "Lao",
    "lt lit": "Lithuanian",
    "lv lav": "Latvian",
    "mk mkd": "Macedonian",
    "ml mal": "Malayalam",
    "mn mon": "Mongolian",
    "mr mar": "Marathi",
    "ms msa zsm": "Malay",
    "my mya": "Burmese",
    "nb nob no nor": "Norwegian",
    "ne nep npi": "Nepali",
    "nl nld": "Dutch",
    "pa pan": "Punjabi",
    "pl pol": "Polish",
    "pt por": "Portuguese",
    "ro ron": "Romanian",
    "ru rus": "Russian",
    "sk slk": "Slovak",
    "sl slv": "Slovenian",
    "sq sqi": "Albanian",
    "sr srp": "Serbian",
    "sv swe": "Swedish",
    "sw swa": "Swahili",
    "ta tam": "Tamil",
    "te tel": "Telugu",
    "th tha": "Thai",
    "tl tgl fil": "Filipino",
    "tr tur": "Turkish",
    "uk ukr": "Ukrainian",
    "ur urd": "Urdu",
    "uz uzb": "Uzbek",
    "vi vie": "Vietnamese",
    "yo yor": "Yoruba",
    "zh zho cmn": "Chinese",
    "zu zul": "Zulu",
}
_BY_CODE = {code: name for codes, name in _NAMES.items() for code in codes.split()}
_CHARACTER_TOKENIZED = frozenset({"Japanese", "Korean", "Thai", "Khmer", "Lao", "Burmese"})


def language_name(code: str) -> str:
    """The English name of a language code such as "de", "deu", "de-AT" or "zho_Hans"; an unknown one as it is."""
    main = code.replace("_", "-").split("-")[0].lower()
    return _BY_CODE.get(main, code)


def bleu_tokenizer(code: str | None) -> str:
    """sacrebleu's tokenizer for BLEU in a language: by words, or by characters where no spaces part them."""
    name = language_name(code) if code else ""
    if name == "Chinese":
        return "zh"
    return "char" if name in _CHARACTER_TOKENIZED else "13a"
