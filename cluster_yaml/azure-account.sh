#!/usr/bin/env bash
# What azure-spot.yaml needs of a subscription, once: the group, the machines' identity, and the disk that outlives the head.
#   azure-account.sh SUBSCRIPTION STORAGE_ACCOUNT CONTAINER
#   azure-account.sh --ssh-from ADDRESSES        after `ray up`, which opens ssh to everybody: to these only
set -euo pipefail
group=moedisco location=eastus

if [ "$1" = --ssh-from ]; then
    firewall=$(az network nsg list --resource-group $group --query "[?starts_with(name, 'ray-moedisco-')].name" --output tsv)
    exec az network nsg rule update --resource-group $group --nsg-name "$firewall" --name SSH --source-address-prefixes "$2"
fi

az account set --subscription "$1"
az group create --name $group --location $location
identity=$(az identity create --name moedisco --resource-group $group --query principalId --output tsv)
account=$(az storage account show --name "$2" --query id --output tsv)
# Reads the one container; Ray's launcher itself makes the identity a contributor to this group, and to nothing else.
az role assignment create --role "Storage Blob Data Reader" --assignee-object-id "$identity" --assignee-principal-type ServicePrincipal \
    --scope "$account/blobServices/default/containers/$3"
az disk create --name moedisco-state --resource-group $group --zone 1 --size-gb 200 --sku Premium_LRS
