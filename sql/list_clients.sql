-- All clients, by name, without their secrets.
select id, name, scopes, projects, created_at
from clients
order by name
