"""Starting the processes of one training, and watching them: the launcher's interface and those that there are."""
