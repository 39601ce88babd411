"""What ours is compared with: loops as the papers print them, and adapters to installed libraries."""
