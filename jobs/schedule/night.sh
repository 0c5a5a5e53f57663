# night.sh LABEL=VALUE RAYJOB.yaml: create a RayJob unless one with this label is still active, and
# wait for it to end. Exits with 0 if it completed.
set -eu
state='{.metadata.name} {.status.jobDeploymentStatus}{"\n"}'
listed=$(kubectl get rayjobs --selector "$1" --output "jsonpath={range .items[*]}$state{end}")
busy=$(printf '%s\n' "$listed" | grep -Ev '^$| (Complete|Failed|ValidationFailed)$' || true)
if [ -n "$busy" ]; then
  echo "not started: $busy" >&2
  exit 1
fi
job=$(kubectl create --filename "$2" --output name)
echo "created $job"
while :; do
  # No answer does not mean the end: ask again. Older operators report failed jobs as Complete too.
  status='jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}'
  case $(kubectl get "$job" --output "$status" || echo unknown) in
    "Complete SUCCEEDED") echo "complete"; exit 0 ;;
    Complete* | Failed* | ValidationFailed*) echo "failed: kubectl describe $job" >&2; exit 1 ;;
  esac
  sleep "${PMET_POLL_S:-30}"
done
