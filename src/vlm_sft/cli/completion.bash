# Completion of vlm-sft, made by `vlm-sft completion`.
_vlm_sft() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
  local path='' next flags values='' index longer
  _vlm_sft_place "$path"
  for ((index = 1; index < COMP_CWORD; index++)); do
    longer="${path:+$path }${COMP_WORDS[index]}"
    case " $next " in
      *" ${COMP_WORDS[index]} "*) path="$longer"; _vlm_sft_place "$path" ;;
    esac
  done
  _vlm_sft_values "${path:+$path }$before"
  COMPREPLY=()
  if [[ "$values" == '@files' ]]; then
    COMPREPLY=($(compgen -f -- "$word"))
  elif [[ -n "$values" ]]; then
    COMPREPLY=($(compgen -W "$values" -- "$word"))
  elif [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
  elif [[ -n "$next" ]]; then
    COMPREPLY=($(compgen -W "$next" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}
_vlm_sft_place() {
  next='' flags=''
  case "$1" in
@PLACES@
  esac
}
_vlm_sft_values() {
  values=''
  case "$1" in
@VALUES@
  esac
}
complete -o filenames -F _vlm_sft vlm-sft
