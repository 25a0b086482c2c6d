#!/usr/bin/env bash
# Downloads a data set and makes the HDF5 shards of both phases (128 and 512 tokens) from it:
#
#     bash create_datasets_from_start.sh              English Wikipedia (wiki_only)
#     bash create_datasets_from_start.sh wiki_books   English Wikipedia and books
#     bash create_datasets_from_start.sh sample       106 articles, in a minute
#     bash create_datasets_from_start.sh wikicorpus_de           Wikipedia in another language
#     bash create_datasets_from_start.sh corpus NAME PATH…       your own text: files, folders, patterns, s3://, https://
#
# The last two train a vocabulary on the text, unless VOCAB_FILE names one.  Flags of bertPrep.py may follow each of these,
# and go to all stages: --language de --vocab_size 30000 --masked_lm_prob 0.4 --whole_word_mask --no_nsp …
#
# After an interruption, the same command continues.  Environment variables:
#
#     PYTHON                  default: python3
#     N_PROCESSES             default: the number of cores
#     BERT_PREP_WORKING_DIR   where all files are kept; default: this folder
#     BERT_PREP_MIRRORS       "FROM TO …": download what starts with FROM from TO instead
#     VOCAB_FILE              default: the vocabulary that create_vocabulary trained, else Google's
#     BOOKS                   for wiki_books: a folder of .txt books, a file of their URLs, or an archive of them
#     DYNAMIC_MASKING=1       store samples without masks; training draws new masks in every epoch
set -euo pipefail

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
processes=${N_PROCESSES:-$(getconf _NPROCESSORS_ONLN)}

if [ -n "${VOCAB_FILE:-}" ] && [ -e "$here/$VOCAB_FILE" ]; then
    VOCAB_FILE=$here/$VOCAB_FILE
fi
flags=()

stage() {
    echo "== $*" ${flags[@]+"${flags[@]}"}
    "$python" bertPrep.py --n_processes "$processes" --action "$@" ${flags[@]+"${flags[@]}"}
}

absolute() {  # absolute PATH: names of files as seen from where the command was given
    case $1 in
        /* | *://*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$here/$1" ;;
    esac
}

take_flags() {  # take_flags FLAG…: those for every stage
    local previous="" word
    for word in "$@"; do
        case $previous,$word in
            --extend[_-]vocab,*) word=$(absolute "$word") ;;
            *,--extend[_-]vocab=*) word=${word%%=*}=$(absolute "${word#*=}") ;;
        esac
        flags+=("$word")
        previous=$word
    done
}

make_samples() {  # the samples of both phases
    local tokens
    for tokens in 128 512; do  # with as many predictions as --masked_lm_prob asks for: by default 20 and 80
        stage create_hdf5_files --dataset "$dataset" --max_seq_length "$tokens" \
            ${VOCAB_FILE:+--vocab_file "$VOCAB_FILE"} ${DYNAMIC_MASKING:+--dynamic_masking}
    done
}

from_formatted_text() {  # what follows text_formatting for one's own text and Wikipedias of other languages
    stage sharding --dataset "$dataset"
    [ -n "${VOCAB_FILE:-}" ] || stage create_vocabulary --dataset "$dataset"
    make_samples
}

[ "${1:-}" = corpus ] || take_flags "${@:2}"
case ${1:-wiki_only} in
    wiki_only | wikicorpus_en)
                dataset=wikicorpus_en;        sources=(wikicorpus_en) ;;
    wiki_books) dataset=books_wiki_en_corpus; sources=(wikicorpus_en bookscorpus) ;;
    sample | wikicorpus_en_sample)
                dataset=wikicorpus_en_sample; sources=(wikicorpus_en_sample) ;;
    wikicorpus_*)
        dataset=$1
        stage download --dataset "$dataset"
        stage text_formatting --dataset "$dataset"
        from_formatted_text
        exit ;;
    corpus)
        dataset=${2:-}
        paths=()
        shift $(($# < 2 ? $# : 2))
        while [ $# -gt 0 ] && [[ $1 != --* ]]; do
            paths+=("$(absolute "$1")")
            shift
        done
        take_flags "$@"
        if [ "${#paths[@]}" = 0 ]; then
            echo "create_datasets_from_start.sh corpus NAME PATH…: a name, and the files or folders of your text" >&2
            exit 2
        fi
        stage text_formatting --dataset "$dataset" --input_files "${paths[@]}"
        from_formatted_text
        exit ;;
    *)  echo "create_datasets_from_start.sh: '$1' is none of wiki_only, wiki_books, sample, wikicorpus_XX, corpus" >&2
        exit 2 ;;
esac

if [ "$dataset" = books_wiki_en_corpus ] && [ ! -e "${BOOKS:-}" ]; then
    echo "create_datasets_from_start.sh: BOOKS='${BOOKS:-}' must be a folder of .txt books, a file of URLs of such" \
         "books, or an archive of them; BookCorpus has no official source any more" >&2
    exit 2
fi

stage estimate --dataset "$dataset" ${DYNAMIC_MASKING:+--dynamic_masking}
if [ "$dataset" != wikicorpus_en_sample ] && [ -z "${VOCAB_FILE:-}" ]; then
    stage download --dataset google_pretrained_weights
fi
for source in "${sources[@]}"; do
    if [ "$source" != bookscorpus ]; then
        stage download --dataset "$source"
        stage text_formatting --dataset "$source"
    elif [ -d "$BOOKS" ]; then
        stage text_formatting --dataset "$source" --input_files "$BOOKS"
    else
        stage download --dataset "$source" --input_files "$BOOKS"
        stage text_formatting --dataset "$source"
    fi
done
stage sharding --dataset "$dataset"
make_samples
