-- The server, as far as BotFarm depends on it.
-- `careless`: what is off of that by which a commit survives a crash, for this user and database.
select
    current_setting('server_version_num')::int as version,
    current_setting('server_encoding') as encoding,
    current_database() as name,
    current_schema() as schema,
    current_setting('search_path') as path,
    array_remove(
        array[
            case when current_setting('fsync') = 'off' then 'fsync' end,
            case when current_setting('full_page_writes') = 'off' then 'full_page_writes' end,
            case when current_setting('synchronous_commit') = 'off' then 'synchronous_commit' end
        ],
        null
    ) as careless
