#!/usr/bin/env bash
# One-time set-up of a project for gcp/spot.yaml: permissions, firewall, the head's persistent disk, and the image. What exists already
# is kept, so that the script can run again.
#   gcp/account.sh PROJECT BUCKET/FOLDER SSH_FROM      the bucket must exist, with uniform access; nodes use this folder only
set -euo pipefail
project=$1 folder=$2 ssh_from=$3
region=us-central1 zone=us-central1-a
export CLOUDSDK_CORE_PROJECT=$project CLOUDSDK_CORE_DISABLE_PROMPTS=1 CLOUDSDK_COMPUTE_REGION=$region CLOUDSDK_COMPUTE_ZONE=$zone

# exists GROUP... NAME
exists() { gcloud "${@:1:$#-1}" describe "${@: -1}" >/dev/null 2>&1; }

gcloud services enable compute.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com

# A role of a managed folder holds for the objects below it, and for listings of it.
exists storage managed-folders "gs://$folder/" || gcloud storage managed-folders create "gs://$folder/"
for who in head worker; do
    exists iam service-accounts "moedisco-$who@$project.iam.gserviceaccount.com" ||
        gcloud iam service-accounts create "moedisco-$who" --display-name="MoE-DisCo $who"
    gcloud storage managed-folders add-iam-policy-binding "gs://$folder/" --role=roles/storage.objectUser \
        --member="serviceAccount:moedisco-$who@$project.iam.gserviceaccount.com"
done
# The head may only create and delete instances with their disks, and attach the worker's account to them.
role=create
exists --project="$project" iam roles moediscoHead && role=update
gcloud iam roles $role moediscoHead --project="$project" --title="MoE-DisCo head" --permissions="$(paste -sd, <<'PERMISSIONS'
compute.acceleratorTypes.list
compute.disks.create
compute.disks.setLabels
compute.disks.use
compute.images.useReadOnly
compute.instances.create
compute.instances.delete
compute.instances.get
compute.instances.list
compute.instances.setLabels
compute.instances.setMetadata
compute.instances.setServiceAccount
compute.instances.setTags
compute.machineTypes.get
compute.subnetworks.use
compute.subnetworks.useExternalIp
compute.zoneOperations.get
PERMISSIONS
)"
gcloud projects add-iam-policy-binding "$project" --role="projects/$project/roles/moediscoHead" --condition=None \
    --member="serviceAccount:moedisco-head@$project.iam.gserviceaccount.com"
gcloud iam service-accounts add-iam-policy-binding "moedisco-worker@$project.iam.gserviceaccount.com" \
    --role=roles/iam.serviceAccountUser --member="serviceAccount:moedisco-head@$project.iam.gserviceaccount.com"

exists compute networks moedisco || gcloud compute networks create moedisco --subnet-mode=custom
exists compute networks subnets moedisco || gcloud compute networks subnets create moedisco --network=moedisco --range=10.77.0.0/20
exists compute firewall-rules moedisco-ssh ||
    gcloud compute firewall-rules create moedisco-ssh --network=moedisco --allow=tcp:22 --source-ranges="$ssh_from"
exists compute firewall-rules moedisco-nodes ||
    gcloud compute firewall-rules create moedisco-nodes --network=moedisco --allow=tcp,udp,icmp --source-ranges=10.77.0.0/20

exists compute disks moedisco-state || gcloud compute disks create moedisco-state --type=pd-balanced --size=20GB
# A copy, because the image family changes over time.
exists compute images moedisco || gcloud compute images create moedisco \
    --source-image-family=common-cu129-ubuntu-2204-nvidia-580 --source-image-project=deeplearning-platform-release
